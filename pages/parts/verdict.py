"""The verdict of an outlier rule: its thresholds, its sentence, and what the other rules say."""

import math

import pandas as pd
import streamlit as st

from pages.parts.routes import PAGES
from pages.parts.words import layer_name, plain
from zo_core.analysis.outliers import RULES, Verdict, first_outlier_layer

LEAST = {"jump": 1.0, "ratio": 1.0, "magnitude": 0.0}
"""The smallest value of each threshold that makes sense."""


def threshold(rule: str, name: str, default: float, n_layers: int) -> float:
    """The field of one number of a rule; the default while it is empty."""
    if name == "persist":  # a number of layers: its bound, and so its key, is the model's
        default = min(int(default), n_layers)
        bounds = {"min_value": 0, "max_value": n_layers, "step": 1}
        key = f"rule_{rule}_{name}_{n_layers}"
    else:
        bounds = {"min_value": LEAST[name], "step": 1.0, "format": "%g"}
        key = f"rule_{rule}_{name}"
    value = st.number_input(
        name, value=default, key=key, width=140, persist_state="session", **bounds
    )
    return default if value is None or not math.isfinite(value) else value


def judge(layers: pd.DataFrame, n_layers: int) -> Verdict:
    """The rule picker, the verdict in one sentence, and all rules side by side."""
    place = st.container(key="verdict")
    with st.container(horizontal=True, vertical_alignment="bottom", key="rule_picker"):
        rule = st.segmented_control(
            "Outlier rule",
            list(RULES),
            format_func=lambda r: RULES[r].title,
            default="emergence",
            key="outlier_rule",
            required=True,
            persist_state="session",
        )
        parameters = {}
        for name, default in RULES[rule].parameters.items():
            parameters[name] = threshold(rule, name, default, n_layers)
    st.caption(f"{RULES[rule].definition} Source: {RULES[rule].source}.")
    verdicts = {
        name: first_outlier_layer(name, layers, **(parameters if name == rule else {}))
        for name in RULES
    }
    verdict = verdicts[rule]
    with place:
        if verdict.layer is None:
            st.header("No first outlier layer", anchor=False)
        else:
            name = layer_name(verdict.layer, n_layers)
            st.header(f"{name[0].upper()}{name[1:]} is the first outlier layer", anchor=False)
        st.markdown(f"{RULES[rule].title} rule: {plain(verdict.reason)}")
        if verdict.layer is not None:
            fine_tune(verdict.layer, "Fine-tune dominant layer", "fine_tune_dominant", primary=True)
        else:
            st.caption(
                "Fixed thresholds miss many models: try another rule or lower its numbers, or "
                "measure instead on the Sensitivity page."
            )
    with st.expander("What each rule says", key="all_verdicts"):
        st.dataframe(
            pd.DataFrame(
                [
                    {
                        "Rule": RULES[name].title,
                        "Layer (0-based)": "none found" if v.layer is None else str(v.layer),
                        "Why": v.reason,
                        "Parameters": ", ".join(f"{k} = {x:g}" for k, x in v.parameters.items()),
                    }
                    for name, v in verdicts.items()
                ]
            ),
            hide_index=True,
            key="verdict_table",
            row_height=56,
            column_config={"Why": st.column_config.TextColumn(width="large")},
        )
    return verdict


def fine_tune(layer: int, label: str, key: str, primary: bool = False) -> None:
    """A button that opens the fine-tune page on one layer."""
    if st.button(
        label, key=key, type="primary" if primary else "secondary", icon=":material/trending_down:"
    ):
        st.switch_page(PAGES["fine_tune"], query_params={"scope": f"layer:{layer}"})
