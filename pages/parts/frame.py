"""The app's navigation, and how every page begins."""

from pathlib import Path

import streamlit as st

from pages.parts.routes import PAGES

ICON = str(Path(__file__).with_name("icon.svg"))
_ROUTED = "routed_by_app"
_PLACES = (
    '<style>[data-retained="true"]:has(> .stButton, > .stDownloadButton) {display: none}</style>'
)
"""A button that another replaces is drawn beside it until the script has run, and pushes it aside:
a click on the new one (Cancel, right after Resume) lands where it no longer is."""


def navigation() -> st.Page:
    """Declare the app's name, look and pages, and give the page to run."""
    st.set_page_config(page_title="ZOScope", page_icon=ICON, layout="wide")
    st.logo(ICON, size="large")
    page = st.navigation(
        [
            st.Page(PAGES["model"], title="Model", icon=":material/deployed_code:", default=True),
            st.Page(PAGES["outliers"], title="Outliers", icon=":material/blur_on:"),
            st.Page(PAGES["mechanism"], title="Mechanism", icon=":material/account_tree:"),
            st.Page(PAGES["sensitivity"], title="Sensitivity", icon=":material/bar_chart:"),
            st.Page(PAGES["fine_tune"], title="Fine-tune", icon=":material/trending_down:"),
            st.Page(PAGES["compare"], title="Compare", icon=":material/balance:"),
            st.Page(PAGES["runs"], title="Runs", icon=":material/history:"),
        ]
    )
    st.set_page_config(page_title=f"{page.title} · ZOScope")
    return page


def routed() -> None:
    """Called by app.py: this session goes through it."""
    st.session_state[_ROUTED] = True


def begin(title: str, introduction: str = "") -> None:
    """Title and first sentence of a page.

    A server that has just started takes ``pages/`` for Streamlit's old kind of pages directory and
    runs a page that is opened by its link alone, without app.py. Declaring the navigation ends that
    for the whole server, and the next run of the same link comes through app.py.
    """
    if not st.session_state.get(_ROUTED):
        navigation()
        st.rerun()
    st.html(_PLACES)
    st.title(title, anchor=False)
    if introduction:
        st.markdown(introduction)
