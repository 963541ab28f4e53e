"""ZOScope: see which decoder layer dominates zeroth-order fine-tuning, and tune it.

Run with ``make run`` or ``streamlit run app.py``. Pages draw and never compute: jobs run in the
engine's worker process, and everything shown is read from the run store.
"""

import streamlit as st

from pages.parts.engine_panel import engine_panel
from pages.parts.frame import navigation, routed
from zo_core import backend

page = navigation()
routed()
backend.start(share=True)
with st.sidebar:
    engine_panel()
page.run()
