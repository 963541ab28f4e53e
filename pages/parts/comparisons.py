"""Comparisons as pages list them, and the one that is shown."""

from pathlib import Path

import streamlit as st

from pages.parts.words import clock, plain
from zo_core.compare import store
from zo_core.compare.spec import CompareSpec
from zo_core.compare.status import SessionStatus
from zo_core.compare.store import Comparison

LISTED = 100
WATCHED = 20
"""Newest comparisons that the sidebar looks at."""
STATES = {
    "starting": ("gray", ":material/schedule:"),
    "running": ("blue", ":material/play_circle:"),
    "done": ("green", ":material/check_circle:"),
    "failed": ("red", ":material/error:"),
    "cancelled": ("orange", ":material/cancel:"),
    "interrupted": ("orange", ":material/power_off:"),
}


@st.cache_data(max_entries=256, show_spinner=False)
def _spec(path: str) -> CompareSpec:
    """Specs never change once they are written."""
    return Comparison(Path(path)).spec


def spec_of(comparison: Comparison) -> CompareSpec:
    """The spec of a comparison, read once."""
    return _spec(str(comparison.path))


def title(comparison: Comparison) -> str:
    """What tells a comparison from others."""
    try:
        spec = spec_of(comparison)
    except (OSError, ValueError):
        return "its spec cannot be read"
    named = spec.title.partition(":")[0] or f"{len(spec.arms)} arms"
    seeds = f"{len(spec.seeds)} seed{'' if len(spec.seeds) == 1 else 's'}"
    return " · ".join([named, spec.model, ", ".join(spec.tasks), seeds])


def progress(status: SessionStatus) -> str:
    """How many cells are settled."""
    return f"{status.done} of {status.total} cells" if status.total else ""


def label(comparison: Comparison) -> str:
    """One line for a list."""
    status = comparison.status()
    return f"{clock(comparison.created)} · {title(comparison)} · {status.state}"


def pick() -> Comparison | None:
    """The comparison in the URL, else the newest; draws the list of them."""
    wanted = st.query_params.get("comparison")
    listed = {}
    for comparison in store.list_comparisons():
        if len(listed) < LISTED:
            listed[comparison.comparison_id] = comparison
    if wanted and wanted not in listed:
        try:
            listed[wanted] = store.get(wanted)
        except store.ComparisonNotFoundError:
            st.error(
                f"There is no comparison {plain(wanted[:80])} in this cache: it may have been "
                "deleted.",
                icon=":material/error:",
            )
            return None
    if not listed:
        return None
    shown = wanted or next(iter(listed))
    st.query_params["comparison"] = shown
    if len(listed) > 1:
        st.session_state["shown_comparison"] = shown
        st.selectbox(
            "Comparison",
            list(listed),
            format_func=lambda name: label(listed[name]),
            key="shown_comparison",
            on_change=lambda: st.query_params.update(
                comparison=st.session_state["shown_comparison"]
            ),
        )
    try:
        spec_of(listed[shown])
    except (OSError, ValueError):
        st.error(
            f"The spec of comparison {plain(shown[:80])} cannot be read: it may be of another "
            "version of ZOScope.",
            icon=":material/error:",
        )
        return None
    return listed[shown]


def live() -> list[tuple[Comparison, SessionStatus]]:
    """Comparisons that a process works on, among the newest."""
    found = []
    for _, comparison in zip(range(WATCHED), store.list_comparisons(), strict=False):
        status = comparison.status()
        if status.live:
            found.append((comparison, status))
    return found


def badge(state: str) -> None:
    """The state of a comparison as a coloured word."""
    colour, icon = STATES[state]
    st.badge(state, color=colour, icon=icon)
