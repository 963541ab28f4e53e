"""Runs page: what runs, what waits, and everything that ran before."""

import pandas as pd
import streamlit as st

from pages.parts import curve, history, run_view
from pages.parts.frame import begin
from pages.parts.links import button_link
from pages.parts.routes import KIND_TITLES, PAGE_OF_KIND
from pages.parts.words import clock, duration, plain
from zo_core import plots

STATES = list(run_view.STATES)


def jobs() -> None:
    """Running and queued jobs, each with its progress and a cancel button."""
    seen = states(history.live())

    def tick() -> None:
        live = history.live()
        for entry in live:
            with st.container(border=True, key=f"live_{entry.run_id}"):
                with st.container(horizontal=True, vertical_alignment="center"):
                    run_view.badge(entry.status.state)
                    st.markdown(
                        f"**{KIND_TITLES[entry.job.kind]}** · {plain(entry.title)}", width="content"
                    )
                    st.space("stretch")
                    open_run(entry, f"open_{entry.run_id}")
                    run_view.cancel_button(entry, key=f"cancel_{entry.run_id}")
                run_view.progress(entry)
        if not live:
            st.caption("Nothing is running.")
        if states(live) != seen:
            st.rerun()  # the history below shows states too

    st.subheader("Now", anchor=False)
    with st.container(key="live_jobs"):
        st.fragment(tick, run_every=1.0 if seen else 5.0)()


def states(entries: list[history.Entry]) -> list[tuple[str, str]]:
    """What the history shows of live runs."""
    return [(entry.run_id, entry.status.state) for entry in entries]


def open_run(entry: history.Entry, key: str, primary: bool = False) -> None:
    """A link to a run on the page of its kind."""
    page = PAGE_OF_KIND[entry.job.kind]
    button_link(page, "Open", key, ":material/open_in_new:", primary, run=entry.run_id)


def filtered(entries: list[history.Entry]) -> list[history.Entry]:
    """The runs of the chosen kinds and states; nothing chosen means all but comparisons' cells."""
    alone = history.by_hand(entries)
    with st.container(horizontal=True, key="run_filters"):
        kinds = st.pills(
            "Kind",
            list(history.KINDS),
            selection_mode="multi",
            format_func=KIND_TITLES.get,
            key="filter_kind",
            persist_state="session",
        )
        wanted = st.pills(
            "State", STATES, selection_mode="multi", key="filter_state", persist_state="session"
        )
        cells = len(entries) - len(alone)
        if cells and not st.toggle(
            f"Runs of comparisons ({cells:,})", key="filter_cells", persist_state="session"
        ):
            entries = alone
    return [
        e
        for e in entries
        if (not kinds or e.job.kind in kinds) and (not wanted or e.status.state in wanted)
    ]


def worked(entry: history.Entry) -> str:
    """How long a run took."""
    seconds = entry.run.seconds_of_work(entry.status)
    return "" if seconds is None else duration(seconds)


def listing(entries: list[history.Entry]) -> list[history.Entry]:
    """The table of runs; gives the selected ones."""
    comparisons = history.comparison_of()
    rows = pd.DataFrame(
        [
            {
                "Kind": KIND_TITLES[e.job.kind],
                "State": e.status.state,
                "Result": e.key_result,
                "Model": e.job.model,
                "Task": e.job.task if getattr(e.job, "text", "task") == "task" else e.job.text,
                "Scope": e.scope,
                "Started": clock(e.status.created),
                "Time": "" if e.status.live else worked(e),
                "Run": e.run_id,
                "Comparison": comparisons.get(e.run_id),
            }
            for e in entries
        ]
    )
    if not rows["Comparison"].notna().any():
        rows = rows.drop(columns="Comparison")
    # A selection is a row number: a list of other runs must not inherit it.
    key = f"runs_table_{hash(tuple(e.run_id for e in entries)) & 0xFFFFFF:x}"
    with st.container(key="runs_table"):
        picked = st.dataframe(
            rows,
            hide_index=True,
            key=key,
            on_select="rerun",
            selection_mode="multi-row",
            height=min(38 + 35 * len(rows), 460),
            column_config={"Result": st.column_config.TextColumn(width="medium")},
        )
    return [entries[i] for i in picked.selection.rows if i < len(entries)]


@st.dialog("Delete runs?")
def confirm_delete(selected: list[history.Entry]) -> None:
    """Ask, then delete."""
    st.markdown("This removes their folders with all results and checkpoints, for good:")
    st.markdown("\n".join(f"- {plain(e.label)}" for e in selected[:10]))
    if len(selected) > 10:
        st.markdown(f"and {len(selected) - 10} more")
    if st.button("Delete", key="confirm_delete", type="primary", icon=":material/delete:"):
        try:
            for entry in selected:
                entry.run.delete()
        except (RuntimeError, OSError) as error:
            st.error(plain(str(error)))
        else:
            st.rerun()


def actions(selected: list[history.Entry]) -> None:
    """What can be done with the selected runs."""
    one = selected[0] if len(selected) == 1 else None
    ended = [e for e in selected if not e.status.live]
    with st.container(horizontal=True, vertical_alignment="center", key="run_actions"):
        if one:
            open_run(one, "open_run", primary=True)
            st.download_button(
                "Export (zip)",
                one.run.zip_bytes,
                f"{one.run_id}.zip",
                "application/zip",
                key="export_run",
                icon=":material/download:",
                on_click="ignore",
            )
        else:
            st.button("Export (zip)", key="export_none", icon=":material/download:", disabled=True)
        if st.button("Delete", key="delete_runs", icon=":material/delete:", disabled=not ended):
            confirm_delete(ended)
        if not selected:
            st.caption("Select rows to open, export, delete or overlay runs.")
        elif len(ended) < len(selected):
            st.caption("Live runs are not deleted: cancel them first.")


def overlay(selected: list[history.Entry]) -> None:
    """Loss curves of the selected tuning runs over each other."""
    curves = {}
    for entry in selected:
        if entry.job.kind == "tune":
            metrics = curve.curve(entry.run)
            if len(metrics):
                curves[f"{entry.title} · {entry.run_id[-6:]}"] = metrics.steps
    if not curves:
        return
    st.subheader("Loss curves", anchor=False)
    with st.container(horizontal=True):
        axis = st.segmented_control(
            "X-axis",
            list(plots.AXES),
            format_func=plots.AXES.get,
            default="step",
            key="overlay_axis",
            required=True,
        )
        span = st.select_slider(
            "Smoothing (steps)",
            [1, 5, 10, 20, 50, 100, 200, 500],
            value=50,
            key="overlay_span",
            width=240,
        )
    st.plotly_chart(
        plots.overlay(curves, axis, span), key="overlay_chart", alt="Smoothed loss of several runs"
    )


begin("Runs")
jobs()
st.subheader("History", anchor=False)
everything = history.entries()
if not everything:
    st.info("No run yet. Begin with a scan of the bundled model.", icon=":material/blur_on:")
    button_link(
        PAGE_OF_KIND["scan"], "Scan the model", "go_scan", ":material/arrow_forward:", primary=True
    )
else:
    matching = filtered(everything)
    if matching:
        chosen = listing(matching)
        actions(chosen)
        overlay(chosen)
    else:
        st.caption("No run matches these filters.")
