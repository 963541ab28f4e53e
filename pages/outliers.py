"""Outliers page: where massive activations first appear, by which rule and with which numbers."""

import plotly.graph_objects as go
import streamlit as st

from pages.parts import history, launch, run_view
from pages.parts.choice import current, line
from pages.parts.frame import begin
from pages.parts.result_exports import exports
from pages.parts.scan_pictures import pictures
from pages.parts.scans import Scan
from pages.parts.text_fields import text_fields
from pages.parts.verdict import judge, thresholds
from pages.parts.words import plain
from zo_core import plots
from zo_core.analysis.known import recognise
from zo_core.analysis.outliers import Verdict
from zo_core.analysis.outliers.agreement import judge_all, rules_table
from zo_core.analysis.outliers.weights import owl_weights
from zo_core.jobs import ScanJob

TABLES = {
    "layers": "block output by layer",
    "parts": "the same statistics of all four parts",
    "rules": "what each rule says, with its numbers",
    "channels": "largest magnitude by layer, part and channel",
    "tokens": "largest magnitude by layer and token",
    "weights": "down-projections, weights only",
    "owl": "shares of Wanda scores by layer",
}
"""What the tables of a scan hold."""


def choose_other(scan: Scan) -> Scan | None:
    """The scan to compare with, if the reader wants one: another model, text or setting."""
    others = {
        e.run_id: e
        for e in history.entries(("scan",))
        if e.status.state == "done" and e.run_id != scan.entry.run_id
    }
    if not others:
        return None
    wanted = st.query_params.get("with")
    st.session_state["compare_with"] = wanted if wanted in others else ""

    def remember() -> None:
        chosen = st.session_state["compare_with"]
        if not chosen:
            st.query_params.pop("with", None)
        else:
            st.query_params["with"] = chosen

    labels = history.labels(others.values())
    chosen = st.selectbox(
        "Compare with",
        ["", *others],
        format_func=lambda r: labels[r] if r else "no other scan",
        key="compare_with",
        on_change=remember,
        help="Two models, or one model on two texts, side by side on one scale",
    )
    return Scan(others[chosen]) if chosen else None


def select(scan: Scan, named: int | None) -> int:
    """The selected layer: the clicked one, else the one that the rule names."""
    # A click lands in this key before the widget is drawn further down.
    if (
        st.session_state.get("outlier_layer") not in scan.layers
        or st.session_state.get("outlier_layer_of") != scan.entry.run_id
    ):
        st.session_state["outlier_layer"] = scan.layers[0] if named is None else named
    st.session_state["outlier_layer_of"] = scan.entry.run_id
    return st.session_state["outlier_layer"]


def weighting(scan: Scan, verdicts: dict[str, Verdict], first: int | None) -> go.Figure | None:
    """The layer weights of OWL and OwLore."""
    if scan.tables.owl is None or scan.tables.owl.empty:
        return None
    m = verdicts["owl"].parameters["m"]
    figure = plots.layer_weights(owl_weights(scan.tables.owl, m), m, first)
    with st.expander("Layer weights of OWL and OwLore", key="owl_weights"):
        st.plotly_chart(figure, key="owl_chart", alt="Share of outlying Wanda scores by layer")
    return figure


def results(entry: history.Entry) -> None:
    """Everything a finished scan shows."""
    scan = Scan(entry)
    try:
        n_layers, _ = len(scan.layers), scan.tokens
    except (OSError, ValueError) as error:
        st.error(f"The results of this scan cannot be read: {plain(str(error))}")
        return
    other = choose_other(scan)
    others = None
    try:
        if other is not None:
            n_other, _ = len(other.layers), other.tokens
            others = judge_all(other.tables, thresholds(n_other))
    except (OSError, ValueError) as error:
        st.error(f"The other scan cannot be read: {plain(str(error))}")
    rule, verdicts = judge(scan.tables, n_layers, entry.summary.get("published"), others)
    first = verdicts[rule].layer
    scans, firsts = [scan], [first]
    if other is not None and others is not None:
        scans.append(other)
        firsts.append(others[rule].layer)
    selected = select(scan, first)
    with st.container(key="two_scans" if len(scans) > 1 else "one_scan"):
        figures = pictures(scans, firsts, selected)
    weights = weighting(scan, verdicts, first)
    if weights is not None:
        figures["Layer weights"] = weights
    part = f" tokens: of the {scan.covered}." if scan.covered else ""
    exports(
        entry,
        TABLES,
        {"rules": rules_table(verdicts), "tokens": scan.tokens, **scan.tables.named()},
        figures,
        f"Layer -1 is the embedding output. What the columns are: docs/scan.md.{part}",
        {name: dict(verdict.parameters) for name, verdict in verdicts.items()},
    )


def show(entry: history.Entry) -> None:
    """A scan, live or ended."""
    if entry.status.state == "done":
        results(entry)


begin(
    "Outliers",
    "A scan records the largest activations in every decoder layer. The Dominant-Layer paper "
    "suggests starting fine-tuning with the layer where massive activations first appear.",
)
choice = current()
line(choice)
shown = run_view.pick("scan", choice)
with (
    st.container(key="new_scan"),
    st.expander(
        "New scan", expanded=shown is None, icon=":material/add:", key=f"new_scan_{shown is None}"
    ),
):
    launch.launch_row(
        ScanJob, text_fields("scan", ScanJob) | choice.fields(), "Scan", key="start_scan"
    )
if shown is None:
    if "run" not in st.query_params:
        st.info(
            "No scan of this model yet. Press **Scan** above: on the bundled model it takes a few "
            "seconds.",
            icon=":material/arrow_upward:",
        )
        match = recognise(choice.model)
        for answer in match.known.published if match else ():
            st.info(plain(f"{match.known.name}, {answer.sentence}."), icon=":material/menu_book:")
else:
    run_view.follow(shown, show, every=0.5)
