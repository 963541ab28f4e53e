"""Downloads of a run: every table as CSV and Parquet, the sidecar, all figures as one page."""

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from pages.parts import history
from zo_core import export
from zo_core.jobs import command_line


@st.cache_data(max_entries=48, show_spinner=False)
def _read(path: str, changed: int) -> pd.DataFrame:
    return pd.read_parquet(path)


def table(entry: history.Entry, name: str) -> pd.DataFrame | None:
    """A result table, read once; None if the run has none of that name.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    path = entry.run.result(f"{name}.parquet")
    try:
        return _read(str(path), path.stat().st_mtime_ns)
    except FileNotFoundError:
        return None


def _button(label: str, data: object, entry: history.Entry, name: str, mime: str, key: str) -> None:
    st.download_button(
        label,
        data,
        f"{entry.run_id}-{name}",
        mime,
        key=key,
        icon=":material/download:",
        on_click="ignore",
    )


def tables(entry: history.Entry, names: Sequence[str]) -> None:
    """A CSV button for every table that is there, and the Parquet files in a popover."""
    there = [n for n in names if entry.run.result(f"{n}.parquet").is_file()]
    for name in there:
        path = entry.run.result(f"{name}.parquet")
        _button(
            f"{name}.csv",
            lambda path=path: export.csv_bytes(pd.read_parquet(path)),
            entry,
            f"{name}.csv",
            "text/csv",
            f"download_{name}",
        )
    with st.popover("Parquet", icon=":material/table:", key="download_parquet"):
        for name in there:
            path = entry.run.result(f"{name}.parquet")
            _button(
                f"{name}.parquet",
                path.read_bytes,
                entry,
                f"{name}.parquet",
                "application/vnd.apache.parquet",
                f"download_{name}_parquet",
            )


def sidecar(entry: history.Entry) -> None:
    """The facts behind the tables."""
    found = entry.run.result_json("provenance.json")
    if found:
        facts = found | {"summary": entry.summary}
        _button(
            "provenance.json",
            lambda: export.json_bytes(facts),
            entry,
            "provenance.json",
            "application/json",
            "download_provenance",
        )


def report(entry: history.Entry, title: str, figures: list, notes: list[str]) -> None:
    """All figures as one self-contained HTML page."""
    _button(
        "Figures (HTML)",
        lambda: export.html_bytes(
            title,
            figures,
            [*notes, f"Run {entry.run_id}. Layers are 0-based."],
            command_line(entry.job),
        ),
        entry,
        "figures.html",
        "text/html",
        "download_html",
    )
