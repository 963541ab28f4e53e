"""ZOScope: see which decoder layer dominates zeroth-order fine-tuning, and tune it.

Run with ``make run`` or ``streamlit run app.py``. Pages draw and never compute: jobs run in the
engine's worker process, and everything shown is read from the run store.
"""

from pathlib import Path

import streamlit as st

from pages.parts.engine_panel import engine_panel
from pages.parts.routes import PAGES
from zo_core import backend

ICON = Path(__file__).parent / "pages" / "parts" / "icon.svg"

st.set_page_config(page_title="ZOScope", page_icon=str(ICON), layout="wide")
st.logo(str(ICON), size="large")

page = st.navigation(
    [
        st.Page(PAGES["model"], title="Model", icon=":material/deployed_code:", default=True),
        st.Page(PAGES["outliers"], title="Outliers", icon=":material/blur_on:"),
        st.Page(PAGES["sensitivity"], title="Sensitivity", icon=":material/bar_chart:"),
        st.Page(PAGES["fine_tune"], title="Fine-tune", icon=":material/trending_down:"),
        st.Page(PAGES["runs"], title="Runs", icon=":material/history:"),
    ]
)
backend.start(share=True)
with st.sidebar:
    engine_panel()
page.run()
