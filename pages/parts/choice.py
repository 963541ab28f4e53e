"""The model choice (model, revision, dtype, device) that all pages share.

It lives in the session and is mirrored into the URL, so that links can be copied.
"""

from dataclasses import asdict, astuple, dataclass, fields

import streamlit as st

from pages.parts.routes import PAGES
from pages.parts.words import plain, shorten
from zo_core.models import catalog

_KEY = "model_choice"
_MIRRORED = "model_choice_in_url"


@dataclass(frozen=True, slots=True)
class Choice:
    """Field names and defaults are those of every job spec."""

    model: str = "demo"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"

    def fields(self) -> dict[str, str | None]:
        """The fields of a job spec."""
        return asdict(self)

    def query(self) -> dict[str, str]:
        """What differs from the defaults, as parameters of a link."""
        values = zip(fields(self), astuple(self), strict=True)
        return {f.name: value for f, value in values if value and value != f.default}

    @property
    def label(self) -> str:
        """The model's name with its revision."""
        return shorten(self.model) + (f"@{self.revision}" if self.revision else "")


def current() -> Choice:
    """The chosen model: from the URL when it is new there, else from this session."""
    names = [f.name for f in fields(Choice)]
    in_url = {n: st.query_params[n] for n in names if st.query_params.get(n)}
    choice = st.session_state.get(_KEY)
    if choice is None or (in_url and in_url != st.session_state.get(_MIRRORED)):
        choice = Choice(**in_url)
    remember(choice)
    return choice


def remember(choice: Choice) -> None:
    """Keep the choice for all pages and mirror what differs from the defaults into the URL."""
    st.session_state[_KEY] = choice
    wanted = choice.query()
    for f in fields(choice):
        if f.name not in wanted:
            st.query_params.pop(f.name, None)
        elif st.query_params.get(f.name) != wanted[f.name]:
            st.query_params[f.name] = wanted[f.name]
    st.session_state[_MIRRORED] = wanted


@st.cache_data(ttl=600, max_entries=32, show_spinner="Reading the model's configuration")
def _described(model: str, revision: str | None) -> catalog.ModelInfo:
    return catalog.describe(model, revision)


def describe(choice: Choice) -> tuple[catalog.ModelInfo | None, str]:
    """What the chosen model is, or None and the sentence that says why it cannot be read."""
    try:
        return _described(choice.model, choice.revision), ""
    except catalog.ModelError as error:
        return None, str(error)


def line(choice: Choice) -> None:
    """One line that names the chosen model and leads to where it is changed."""
    precision = "" if choice.dtype == "auto" else f" · {choice.dtype}"
    device = "" if choice.device == "auto" else f" · {choice.device}"
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="model_line"):
        st.markdown(f"Model **{plain(choice.label)}**{precision}{device}", width="content")
        st.page_link(PAGES["model"], label="change", icon=":material/swap_horiz:")
