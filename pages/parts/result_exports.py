"""What a scan, mechanism run or probe leaves: tables, figures, its report and its model's."""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from pages.parts import history
from pages.parts.choice import Choice
from zo_core import export
from zo_core.jobs import command_line
from zo_core.reports.images import NO_CHROMIUM, find_chromium, image_bytes
from zo_core.reports.model import ModelRuns, model_report
from zo_core.reports.run import TITLES, Parameters, run_report

if TYPE_CHECKING:
    import plotly.graph_objects as go


def exports(
    entry: history.Entry,
    about: Mapping[str, str],
    tables: Mapping[str, pd.DataFrame | None],
    figures: Mapping[str, "go.Figure"],
    note: str,
    parameters: Parameters | None = None,
) -> None:
    """The export section of a run that has ended.

    Files are made at the click, in a thread of their own: no page waits for a picture.

    Args:
        entry: the run.
        about: what each table holds, by name, in the order of the list.
        tables: those that the run has, by name.
        figures: as drawn on the page, by title.
        note: where the columns are explained, and what else to know.
        parameters: thresholds of outlier rules on the page, for the report of a scan.
    """
    st.subheader("Export", anchor=False)
    there = {name: tables[name] for name in about if tables.get(name) is not None}
    with st.container(key=f"{entry.job.kind}_downloads"):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            _table(entry, about, there)
        if figures:
            with st.container(horizontal=True, vertical_alignment="bottom"):
                _figure(entry, figures)
        with st.container(horizontal=True, vertical_alignment="center"):
            _button(
                "Report (HTML)",
                lambda: run_report(entry.run, parameters),
                f"{entry.run_id}-report.html",
                "text/html",
                "This run: figures, tables, settings, versions and hardware in one file that opens "
                "offline",
            )
            _model(entry)
            _button(
                "summary.json", lambda: _facts(entry), f"{entry.run_id}.json", "application/json"
            )
            _button("Raw run (zip)", entry.run.zip_bytes, f"{entry.run_id}.zip", "application/zip")
    st.caption(f"Layers are 0-based. {note}")


def _table(
    entry: history.Entry, about: Mapping[str, str], tables: Mapping[str, pd.DataFrame]
) -> None:
    name = st.selectbox(
        "Table",
        list(tables),
        format_func=lambda n: f"{n}: {about[n]}",
        key="export_table",
        width=380,
    )
    table, stem = tables[name], f"{entry.run_id}-{name}"
    _button("CSV", lambda: export.csv_bytes(table), f"{stem}.csv", "text/csv")
    parquet = "application/vnd.apache.parquet"
    _button("Parquet", lambda: export.parquet_bytes(table), f"{stem}.parquet", parquet)


def _figure(entry: history.Entry, figures: Mapping[str, "go.Figure"]) -> None:
    title = st.selectbox("Figure", list(figures), key="export_figure", width=380)
    figure = figures[title]
    stem = f"{entry.run_id}-{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}"
    _button(
        "HTML",
        lambda: export.html_bytes(
            f"{title}: {entry.title}",
            [(title, figure)],
            [f"Run {entry.run_id}. Layers are 0-based."],
            command_line(entry.job),
        ),
        f"{stem}.html",
        "text/html",
    )
    if find_chromium() is None:
        st.caption(NO_CHROMIUM)
        return
    drawn = "Drawn by the Chromium on the machine of this app: takes some seconds"
    _button("PNG", lambda: image_bytes(figure, "png"), f"{stem}.png", "image/png", drawn)
    _button("SVG", lambda: image_bytes(figure, "svg"), f"{stem}.svg", "image/svg+xml", drawn)


def _model(entry: history.Entry) -> None:
    """The report of the model, if a run of it has finished."""
    choice = Choice(entry.job.model, entry.job.revision)
    missing = not any(history.of_model(kind, choice, done=True) for kind in TITLES)
    name = re.sub("[^A-Za-z0-9._-]+", "-", choice.label).strip("-.")
    _button(
        "Whole model (HTML)",
        lambda: model_report(ModelRuns.find(choice.model, choice.revision)),
        f"{name}-report.html",
        "text/html",
        "No run of this model has finished"
        if missing
        else "The newest finished scan, mechanism run and probe of this model in one file",
        disabled=missing,
    )


def _facts(entry: history.Entry) -> bytes:
    """The sidecar of the tables."""
    facts = {"run_id": entry.run_id, "job": entry.job.model_dump(mode="json")} | entry.summary
    return export.json_bytes(facts | {"provenance": entry.run.result_json("provenance.json")})


def _button(
    label: str,
    data: Callable[[], bytes],
    name: str,
    mime: str,
    help_text: str | None = None,
    disabled: bool = False,
) -> None:
    st.download_button(
        label,
        data,
        name,
        mime,
        key=f"download_{label.split()[0].lower().removesuffix('.json')}",
        icon=":material/download:",
        on_click="ignore",
        help=help_text,
        disabled=disabled,
    )
