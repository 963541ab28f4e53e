"""What a comparison found, as far as it is: verdict, tables, figures, exports."""

from pathlib import Path

import pandas as pd
import streamlit as st

from pages.parts.live_chart import live_chart
from pages.parts.words import plain
from zo_core import plots
from zo_core.compare.claims import CLAIMS, worded
from zo_core.compare.markdown import search_notes
from zo_core.compare.reader import ALL, Facts
from zo_core.compare.store import Comparison
from zo_core.reports.compare import comparison_report

DECISIONS = {
    "holds": ("green", ":material/check_circle:"),
    "does not hold": ("red", ":material/cancel:"),
    "undecided": ("gray", ":material/help:"),
}
REDRAW_EVERY = 4.0
SHARES = ["mean", "sd", "difference", "low", "high"]
TABLES = {
    "table.csv": "text/csv",
    "measurements.csv": "text/csv",
    "table.parquet": "application/vnd.apache.parquet",
    "measurements.parquet": "application/vnd.apache.parquet",
    "table.json": "application/json",
}


@st.cache_resource(max_entries=4, show_spinner=False)
def _facts(path: str, changed: int) -> Facts | None:
    """The tables of a comparison, read once a version; nobody changes them."""
    return Facts.read(Comparison(Path(path)))


def facts_of(comparison: Comparison) -> Facts | None:
    """The results as they are now; None while there are none."""
    try:
        changed = (comparison.path / "curves.parquet").stat().st_mtime_ns
    except OSError:
        return None
    return _facts(str(comparison.path), changed)


def follow(comparison: Comparison) -> None:
    """Draw the results, every few seconds while they grow."""

    def tick() -> None:
        facts = facts_of(comparison)
        if facts is None or not any(row["n"] for row in facts["arms"]):
            st.caption("Results appear with the first finished run of an arm.")
            return
        results(facts)

    live = comparison.status().live
    st.fragment(tick, run_every=REDRAW_EVERY if live else None)()


def results(facts: Facts) -> None:
    """All results, from the verdict down."""
    st.header("Verdict", anchor=False)
    verdict(facts)
    st.header("Arms", anchor=False)
    task = facts.tasks[-1]
    if len(facts.tasks) > 1:
        task = st.segmented_control(
            "Task",
            facts.tasks,
            format_func=lambda name: "all tasks" if name == ALL else name,
            default=task,
            key="compare_task",
            required=True,
            persist_state="session",
        )
    arms(facts, task)
    sweep(facts, task)
    precision(facts)
    rates(facts)


def verdict(facts: Facts) -> None:
    """A card a claim, and what so many units can tell."""
    found = {claim["key"]: claim for claim in facts["claims"]}
    with st.container(horizontal=True, key="verdict_cards"):
        for key in CLAIMS:
            with st.container(border=True, width=320, height="stretch", key=f"claim_{key}"):
                _card(key, found.get(key), facts)
    if facts["power"]:
        st.caption(facts["power"])


def _card(key: str, claim: dict | None, facts: Facts) -> None:
    st.markdown(f"**{worded(key)}**")
    if claim is None:
        st.badge("not asked", color="gray", icon=":material/remove:")
        st.caption(f"Needs arms with scope {plain(CLAIMS[key].needs)}.")
        return
    colour, icon = DECISIONS[claim["decision"]]
    st.badge(claim["decision"], color=colour, icon=icon)
    st.markdown(plain(claim["sentence"].partition(": ")[2]))
    runs = _runs(facts, claim["run_ids"])
    with st.popover(f"Runs ({len(runs)})", icon=":material/list:", key=f"claim_{key}_runs"):
        st.dataframe(
            runs,
            hide_index=True,
            key=f"claim_{key}_table",
            column_config={"run": st.column_config.LinkColumn("run", display_text="open")},
        )


def _runs(facts: Facts, run_ids: list[str]) -> pd.DataFrame:
    """The cells behind a claim, with a link to each run."""
    wanted = set(run_ids)
    rows = [
        {
            "run": f"fine_tune?run={cell['run_id']}",
            "task": cell["task"],
            "arm": cell["arm"],
            "seed": cell["seed"],
            "value (%)": None if cell["value"] is None else round(100 * cell["value"], 2),
        }
        for cell in facts["cells"]
        if cell["run_id"] in wanted and cell["resolved_scope"] != "zero-shot"
    ]
    return pd.DataFrame(rows, columns=["run", "task", "arm", "seed", "value (%)"])


def arms(facts: Facts, task: str) -> None:
    """Means and paired differences of all arms, with their curves."""
    table = facts.arms(task)
    shown = table.assign(**{name: 100 * table[name].astype(float) for name in SHARES})
    number = st.column_config.NumberColumn
    points = {name: number(name, format="%.2f") for name in SHARES}
    ps = {name: number(name, format="%.3g") for name in ("p", "p_holm", "p_wilcoxon", "lr")}
    columns = ["arm", "lr", "n", "missing", "mean", "sd", "difference", "low", "high", "pairs"]
    columns += ["p", "p_holm", "p_wilcoxon", "effect", "note"]
    st.dataframe(
        shown[columns],
        hide_index=True,
        key="arms_table",
        height=min(38 + 35 * len(shown), 900),
        column_config=points | ps | {"effect": number("d_z", format="%.2f")},
    )
    st.caption(
        f"mean, sd and differences in points of the task's metric; differences to "
        f"{plain(facts['baseline'])}, paired by task and seed, with 95 % bootstrap intervals; p: "
        "exact sign flips, p_holm corrected over arms; d_z: Cohen's effect size of pairs."
    )
    live_chart(
        plots.differences(table, facts["baseline"], facts.spec.margin),
        key=f"differences_{task}",
    )
    curves = facts.curves
    curves = curves[curves["task"] == (task if task != ALL else facts.tasks[0])]
    if len(curves):
        st.subheader("Loss curves", anchor=False)
        where = f" on {facts.tasks[0]}" if task == ALL else ""
        st.caption(
            f"Training loss{where}, smoothed; a line a seed, dotted: the mean of "
            f"{plain(facts['baseline'])}."
        )
        figure = plots.small_multiples(curves, facts.tuned_arms, facts["baseline"])
        live_chart(figure, key=f"curves_{task}")


def sweep(facts: Facts, task: str) -> None:
    """Gain by layer over what inference alone says of the layers."""
    if task not in facts.sweeps:
        return
    st.header("Gain by layer", anchor=False)
    live_chart(plots.layer_sweep(*facts.sweep(task)), key=f"sweep_{task}")
    profiles = "; below, the scan's largest and median activation, and the probe's mean |g|"
    st.caption(
        "Gain: metric after tuning one layer minus zero-shot, with 95 % bootstrap intervals"
        f"{profiles if facts.spec.wants_profiles else ''}."
    )
    found = facts.table("correlations")
    if len(found):
        st.dataframe(
            found[found["task"] == task].drop(columns="task"),
            hide_index=True,
            key="correlations",
            column_config={
                name: st.column_config.NumberColumn(name, format="%.3g") for name in ("rho", "p")
            },
        )
        st.caption(
            "Spearman's rank correlation over layers; outlier: top-1 over median activation."
        )


def precision(facts: Facts) -> None:
    """Whether arithmetic in place changes the picture."""
    table = facts.table("precision")
    if table.empty:
        return
    st.header("Precision", anchor=False)
    points = ["difference", "low", "high"]
    number = st.column_config.NumberColumn
    st.dataframe(
        table.assign(**{name: 100 * table[name].astype(float) for name in points}),
        hide_index=True,
        key="precision_table",
        column_config={name: number(name, format="%.2f") for name in points}
        | {name: number(name, format="%.3g") for name in ("p", "p_holm")},
    )
    st.caption(
        "Arms in place, as published code does it, against the same arm with an fp32 master, in "
        "points; and the lead of the dominant layer over full in place minus that lead with a "
        "master."
    )


def rates(facts: Facts) -> None:
    """How the learning rates were chosen, and what that cost."""
    st.header("Learning rates", anchor=False)
    for sentence in search_notes(facts.all):
        st.markdown(plain(sentence.replace("`", "")))
    table = facts.table("search")
    if len(table):
        with st.expander("Every rate that was tried", key="search_expander"):
            st.dataframe(
                table,
                hide_index=True,
                key="search_table",
                column_config={
                    "lr": st.column_config.NumberColumn("lr", format="%.3g"),
                    "dev_loss": st.column_config.NumberColumn("dev_loss", format="%.4f"),
                },
            )


def downloads(comparison: Comparison) -> None:
    """Tables and the report: outside the part that is redrawn."""
    if comparison.read_json("table.json") is None:
        return
    st.header("Export", anchor=False)
    st.caption(
        "table: a row an arm and task. measurements: a row a run. table.json: everything. The "
        "report holds figures, settings, versions and the command in one HTML file."
    )
    name = comparison.comparison_id
    with st.container(horizontal=True, key="comparison_downloads"):
        for file, kind in TABLES.items():
            st.download_button(
                file,
                (comparison.path / file).read_bytes,
                f"{name}-{file}",
                kind,
                key=f"download_{file.replace('.', '_')}",
                icon=":material/download:",
                on_click="ignore",
            )
        st.download_button(
            "Report (HTML)",
            lambda: comparison_report(comparison),
            f"{name}.html",
            "text/html",
            key="download_report",
            icon=":material/download:",
            on_click="ignore",
        )
