"""The verdicts of the outlier rules: thresholds, the chosen rule's sentence, all side by side."""

import math
from typing import Any

import streamlit as st

from pages.parts.links import fine_tune
from pages.parts.words import layer_name, plain
from zo_core import plots
from zo_core.analysis.outliers import RULES, ScanTables, Verdict
from zo_core.analysis.outliers.agreement import STATES, consensus, judge_all, rules_table

LEAST = {"jump": 1.0, "ratio": 1.0, "magnitude": 0.0, "z": 0.0}
"""The smallest value of each threshold that makes sense."""
SHARES = ("layers", "positions")
NAMED = {
    "activation": "{} is the first outlier layer",
    "feature": "{} is the first with outlier features",
    "weight": "{} is the first with an outlying down-projection",
    "weighting": "{} has the largest weight",
}
"""How a rule of each kind names its layer."""


def _key(rule: str, name: str, n_layers: int) -> str:
    # A number of layers has the model's bound, and so a key of the model.
    return f"rule_{rule}_{name}_{n_layers}" if name == "persist" else f"rule_{rule}_{name}"


def _field(rule: str, name: str, n_layers: int) -> None:
    """The field of one number of a rule."""
    spec, key = RULES[rule], _key(rule, name, n_layers)
    default = spec.parameters[name]
    if name in spec.choices:
        options = list(spec.choices[name])
        st.selectbox(
            name,
            options,
            index=options.index(default),
            format_func=lambda v: f"{v:g}",
            key=key,
            width=140,
            persist_state="session",
        )
        return
    bounds: dict[str, Any] = {"min_value": LEAST.get(name), "step": 1.0, "format": "%g"}
    if name == "persist":
        default = min(int(default), n_layers)
        bounds = {"min_value": 0, "max_value": n_layers, "step": 1}
    elif name in SHARES:
        bounds = {"min_value": 0.0, "max_value": 1.0, "step": 0.01, "format": "%g"}
    st.number_input(name, value=default, key=key, width=140, persist_state="session", **bounds)


def thresholds(n_layers: int) -> dict[str, dict[str, float]]:
    """The numbers of every rule as set on this page; the default where a field is empty."""
    found: dict[str, dict[str, float]] = {}
    for rule, spec in RULES.items():
        found[rule] = {}
        for name, default in spec.parameters.items():
            if name == "persist":
                default = min(int(default), n_layers)
            value = st.session_state.get(_key(rule, name, n_layers))
            usable = value is not None and math.isfinite(value)
            found[rule][name] = value if usable else default
    return found


def judge(
    tables: ScanTables,
    n_layers: int,
    published: dict[str, Any] | None,
    others: dict[str, Verdict] | None = None,
) -> tuple[str, dict[str, Verdict]]:
    """The rule picker, the chosen rule's verdict in one sentence, and all rules side by side.

    Args:
        tables: of the scan.
        n_layers: of the model.
        published: ``published`` of the scan's summary.
        others: what every rule says of the scan that this one is compared with.

    Returns:
        The chosen rule, and what every rule says with the thresholds of this page.
    """
    place = st.container(key="verdict")
    with st.container(horizontal=True, vertical_alignment="bottom", key="rule_picker"):
        rule = st.selectbox(
            "Outlier rule",
            list(RULES),
            format_func=lambda r: RULES[r].title,
            key="outlier_rule",
            width=300,
            persist_state="session",
        )
        for name in RULES[rule].parameters:
            _field(rule, name, n_layers)
    st.caption(f"{RULES[rule].definition} Source: {RULES[rule].source}.")
    verdicts = judge_all(tables, thresholds(n_layers))
    with place:
        _headline(rule, verdicts[rule], n_layers)
        _published(published)
    _side_by_side(verdicts, n_layers, published, others)
    return rule, verdicts


def _headline(rule: str, verdict: Verdict, n_layers: int) -> None:
    spec = RULES[rule]
    if verdict.layer is None:
        what = {"missing": "This scan cannot tell"}.get(verdict.state, "No first outlier layer")
        st.header(what, anchor=False)
    else:
        name = layer_name(verdict.layer, n_layers)
        st.header(NAMED[spec.kind].format(f"{name[0].upper()}{name[1:]}"), anchor=False)
    st.markdown(f"{spec.title} rule: {plain(verdict.reason)}")
    if verdict.layer is not None:
        fine_tune(verdict.layer, "Fine-tune dominant layer", "fine_tune_dominant", primary=True)
    elif verdict.state != "missing":
        st.caption(
            "Fixed thresholds miss many models: try another rule or lower its numbers, or "
            "measure instead on the Sensitivity page."
        )


def _published(published: dict[str, Any] | None) -> None:
    if not published:
        return
    how = "" if published["by"] == "hub id" else " (recognised by its configuration)"
    for answer in published["answers"]:
        about = "; ".join(
            part
            for part in (
                f"channels {', '.join(map(str, answer['channels']))}" if answer["channels"] else "",
                f"magnitude {answer['magnitude']}" if answer["magnitude"] else "",
                answer["note"],
            )
            if part
        )
        sentence = f"{published['name']}{how}, {answer['sentence']}" + (f": {about}" * bool(about))
        st.info(plain(f"{sentence}."), icon=":material/menu_book:")


def published_layer(published: dict[str, Any] | None) -> int | None:
    """The published layer to mark, if there is one."""
    answers = (published or {}).get("answers", [])
    return next((a["layer"] for a in answers if a["layer"] is not None), None)


def _side_by_side(
    verdicts: dict[str, Verdict],
    n_layers: int,
    published: dict[str, Any] | None,
    others: dict[str, Verdict] | None,
) -> None:
    st.subheader("What each rule says", anchor=False)
    if others is None:
        st.markdown(consensus(verdicts))
    else:
        st.markdown(f"A: {consensus(verdicts)}  \nB: {consensus(others)}")
    table = rules_table(verdicts)
    st.plotly_chart(
        plots.named_layers(table, n_layers, published_layer(published)),
        key="rules_chart",
        alt="The layer that each rule names",
    )
    shown = table.assign(layer=_named(verdicts), agree=table["agree"].astype("string").fillna(""))[
        ["title", "layer", "agree", "numbers", "reason", "parameters"]
    ]
    if others is not None:
        shown.insert(2, "other", _named(others))
    with st.container(key="all_verdicts"):
        st.dataframe(
            shown,
            hide_index=True,
            key="verdict_table",
            row_height=36,
            column_config={
                "title": st.column_config.TextColumn("Rule", width="medium", pinned=True),
                "layer": st.column_config.TextColumn(
                    "Layer" if others is None else "Layer, A", width="small", help="0-based"
                ),
                "other": st.column_config.TextColumn("Layer, B", width="small", help="0-based"),
                "agree": st.column_config.TextColumn(
                    "Agree",
                    width="small",
                    help="Rules that name this layer. A weighting has no vote: it always names one",
                ),
                "numbers": st.column_config.TextColumn("Numbers", width="medium"),
                "reason": st.column_config.TextColumn("Why", width="large"),
                "parameters": st.column_config.TextColumn("Thresholds", width="medium"),
            },
        )


def _named(verdicts: dict[str, Verdict]) -> list[str]:
    return [STATES.get(v.state, str(v.layer)) for v in verdicts.values()]
