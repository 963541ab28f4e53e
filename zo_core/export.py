"""Files that leave the app: CSV tables, JSON sidecars and self-contained HTML reports."""

import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2530; max-width: 1200px; margin: 2rem auto;
       padding: 0 1rem; background: #fff }}
h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.15rem; margin: 2rem 0 0 }}
pre {{ background: #f4f6f8; padding: .75rem; overflow-x: auto }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def safe_cell(value: object) -> object:
    """A text cell that no spreadsheet runs as a formula; anything but text as it is."""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value


def csv_bytes(table: pd.DataFrame) -> bytes:
    """A table as UTF-8 CSV: full float precision, formulas in text cells escaped."""
    safe = table.copy()
    for column in safe.select_dtypes(include=["object", "string", "category"]):
        safe[column] = safe[column].astype(object).map(safe_cell)
    return safe.to_csv(index=False, lineterminator="\n").encode()


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """A table as Parquet."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A mapping as readable JSON."""
    return (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode()


def metrics_table(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The records of ``metrics.jsonl`` as one table, a row a record.

    The projected gradients of a step, a list, become ``g`` (one direction) or ``g_1``, ``g_2``, ...
    """
    rows = []
    for record in records:
        row = {key: value for key, value in record.items() if key != "g"}
        g = record.get("g")
        if isinstance(g, list):
            names = ["g"] if len(g) == 1 else [f"g_{i}" for i in range(1, len(g) + 1)]
            row |= dict(zip(names, g, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def html_bytes(
    title: str,
    figures: Sequence[tuple[str, "go.Figure"]],
    notes: Sequence[str] = (),
    command: str = "",
) -> bytes:
    """A report that opens offline in any browser: plotly itself is inside.

    Args:
        title: heading of the page.
        figures: (heading, figure) pairs.
        notes: paragraphs above the figures, plain text.
        command: the command line that gives the same run.
    """
    # Here, as tables need no figures, and a GPU worker may have no plotly.
    import plotly.graph_objects as go
    import plotly.io

    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    if command:
        parts.append(f"<pre>{html.escape(command)}</pre>")
    for i, (heading, figure) in enumerate(figures):
        white = go.Figure(figure).update_layout(template="plotly_white")
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        parts.append(
            plotly.io.to_html(white, full_html=False, include_plotlyjs=i == 0, default_width="100%")
        )
    return _PAGE.format(title=html.escape(title), body="\n".join(parts)).encode()
