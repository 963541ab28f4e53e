"""One chosen layer for all charts of a page: by a click, by a list, or by the link."""

from collections.abc import Callable, Sequence

import streamlit as st

from pages.parts.words import layer_name


def restore(key: str, run_id: str, layers: Sequence[int], default: int) -> int:
    """The chosen layer before its list is drawn: clicks land in the key, links in the URL."""
    asked = st.query_params.get("layer", "")
    if st.session_state.get(f"{key}_of") != run_id or st.session_state.get(key) not in layers:
        linked = {str(layer): layer for layer in layers}
        st.session_state[key] = linked.get(asked, default)
    st.session_state[f"{key}_of"] = run_id
    chosen = st.session_state[key]
    if asked != str(chosen):
        st.query_params["layer"] = str(chosen)
    return chosen


def choose(key: str, layers: Sequence[int], n_layers: int) -> int:
    """The list of layers, which a keyboard reaches."""
    return st.selectbox(
        "Layer", layers, key=key, width=260, format_func=lambda k: layer_name(k, n_layers)
    )


def clicked(chart: str, key: str) -> Callable[[], None]:
    """A callback that chooses the layer of the clicked mark: the first of its ``customdata``."""

    def choose_clicked() -> None:
        points = st.session_state[chart].selection.points
        if points and points[0].get("customdata"):
            st.session_state[key] = int(points[0]["customdata"][0])

    return choose_clicked
