"""Links to another page that look like buttons.

They are links, not buttons that call ``st.switch_page``, for a reason beside the middle mouse
button: the browser then knows that it leaves, and its timers stop. Under ``st.switch_page`` a timer
can still ask for a fragment of the page that is left; Streamlit 1.67 runs it after the new page,
and the browser, told of a page that it no longer shows, empties what it shows.
"""

import streamlit as st

from pages.parts.choice import current
from pages.parts.routes import PAGES


def button_link(
    page: str,
    label: str,
    key: str,
    icon: str,
    primary: bool = False,
    **query: str,
) -> None:
    """Draw one.

    Args:
        page: a page of :data:`pages.parts.routes.PAGES`.
        label: its text.
        key: of the container around it, for its style and for tests.
        icon: a material icon.
        primary: filled with the primary colour.
        query: parameters of the link, beside the chosen model's.
    """
    theme = st.context.theme.type or "light"
    edge = st.get_option(f"theme.{theme}.borderColor")
    filled = st.get_option(f"theme.{theme}.primaryColor")
    style = f"border: 1px solid {edge};"
    inner = ""
    if primary:
        style = f"border: 1px solid {filled}; background: {filled};"
        inner = f".st-key-{key} a * {{color: #fff}}"
    with st.container(key=key, width="content", gap=None):
        st.html(
            f"<style>.st-key-{key} a {{{style} border-radius: .4rem; padding: .25rem .75rem; "
            f"min-height: 2.4rem}} .st-key-{key} a:hover {{filter: brightness(1.08)}}{inner}"
            "</style>"
        )
        st.page_link(page, label=label, icon=icon, query_params=current().query() | query)


def fine_tune(layer: int, label: str, key: str, primary: bool = False) -> None:
    """A link to the fine-tune page with one layer as the scope."""
    icon = ":material/trending_down:"
    button_link(PAGES["fine_tune"], label, key, icon, primary, scope=f"layer:{layer}")
