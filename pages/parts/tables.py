"""Result tables of runs, read once however often a page is drawn."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import streamlit as st

from pages.parts import history


@st.cache_data(max_entries=48, show_spinner=False)
def _read(path: str, changed: int) -> pd.DataFrame:
    return pd.read_parquet(path)


def read(path: Path) -> pd.DataFrame:
    """A Parquet file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    return _read(str(path), path.stat().st_mtime_ns)


def tables(entry: history.Entry, names: Iterable[str]) -> dict[str, pd.DataFrame | None]:
    """Result tables of a run by name; None for those that it does not have.

    Raises:
        OSError: one cannot be read.
        ValueError: one is damaged.
    """
    found: dict[str, pd.DataFrame | None] = {}
    for name in names:
        try:
            found[name] = read(entry.run.result(f"{name}.parquet"))
        except FileNotFoundError:
            found[name] = None
    return found
