"""Compare page: arms over seeds and tasks, live, with statistics and a verdict."""

import streamlit as st

from pages.parts import compare_form, compare_live, compare_results, comparisons
from pages.parts.choice import current, line
from pages.parts.frame import begin

begin(
    "Compare",
    "Which layer should I tune, is it better than the alternatives, and how sure are we? A "
    "comparison gives every arm the same forward passes, batches and seeds, and decides the "
    "Dominant-Layer paper's claims by a stated rule.",
)
choice = current()
line(choice)
shown = comparisons.pick()
opened = shown is None or st.session_state.pop("compare_form_open", False)
with (
    st.container(key="new_comparison"),
    st.expander(
        "New comparison", expanded=opened, icon=":material/add:", key=f"new_comparison_{opened}"
    ),
):
    compare_form.form(choice)
if shown is None:
    if "comparison" not in st.query_params:
        st.info(
            "No comparison yet. **quick** on the bundled model takes minutes: press **Compare** "
            "above.",
            icon=":material/arrow_upward:",
        )
else:
    compare_live.follow(shown)
    compare_results.follow(shown)
    compare_results.downloads(shown)
