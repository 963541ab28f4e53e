"""Files that leave the app: CSV tables, JSON sidecars and self-contained HTML reports."""

import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
nav a {{ margin-right: 1.5rem }} .part > h2 {{ font-size: 1.4rem; margin-top: 3rem;
       padding-top: 1rem; border-top: 2px solid #dde2e7 }}
h3 {{ font-size: 1.05rem; margin: 1.75rem 0 0 }}
pre {{ background: #f4f6f8; padding: .75rem; overflow-x: auto; white-space: pre-wrap }}
.wide {{ overflow-x: auto; margin: .75rem 0 }}
table {{ border-collapse: collapse; font-size: 13px }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .6rem;
          border-bottom: 1px solid #dde2e7 }}
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


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """A table as Parquet."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Code:
    """Text that a page shows as it is, in a box."""

    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what is below it, in order."""

    heading: str
    items: Sequence["str | Code | pd.DataFrame | go.Figure | Section"]
    """Strings are paragraphs of plain text; sections are parts of this one."""

    @property
    def has_parts(self) -> bool:
        """Whether there are sections in it."""
        return any(isinstance(item, Section) for item in self.items)


def html_page(title: str, sections: Sequence[Section]) -> bytes:
    """A page that opens offline in any browser: plotly itself is inside, once.

    Args:
        title: heading of the page.
        sections: its content; an empty heading is left out. Those that have parts are linked at
            the top.
    """
    # Here, as tables need no figures, and a GPU worker may have no plotly.
    import plotly.io

    white = plotly.io.templates["plotly_white"].to_plotly_json()
    n_figures = 0

    def shown(item: "str | Code | pd.DataFrame | go.Figure") -> str:
        nonlocal n_figures
        if isinstance(item, str):
            return f"<p>{html.escape(item)}</p>"
        if isinstance(item, Code):
            return f"<pre>{html.escape(item.text)}</pre>"
        if isinstance(item, pd.DataFrame):
            return _html_table(item)
        n_figures += 1
        # As plain data: a second validation of all points would take most of the time.
        figure = item.to_plotly_json()
        figure["layout"]["template"] = white
        return plotly.io.to_html(
            figure,
            validate=False,
            full_html=False,
            include_plotlyjs=n_figures == 1,
            div_id=f"figure-{n_figures}",
            default_width="100%",
        )

    def written(section: Section, level: int) -> Iterator[str]:
        if section.heading:
            yield f"<h{level}>{html.escape(section.heading)}</h{level}>"
        for item in section.items:
            if isinstance(item, Section):
                yield from written(item, level + 1)
            else:
                yield shown(item)

    links: list[str] = []
    parts: list[str] = []
    for number, section in enumerate(sections):
        if not section.has_parts:
            parts += written(section, 2)
            continue
        links.append(f'<a href="#part-{number}">{html.escape(section.heading)}</a>')
        parts += [f'<section class="part" id="part-{number}">', *written(section, 2), "</section>"]
    contents = [f"<nav>{''.join(links)}</nav>"] if links else []
    body = "\n".join([*contents, *parts])
    return _PAGE.format(title=html.escape(title), body=body).encode()


def _html_table(table: pd.DataFrame) -> str:
    def cell(value: object) -> str:
        if value is None or value is pd.NA or value != value:
            return ""
        if not isinstance(value, float):
            return str(value)
        # Counts beside empty cells are floats, too.
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"

    def row(tag: str, cells: Iterable[object]) -> str:
        return "".join(f"<{tag}>{html.escape(cell(c))}</{tag}>" for c in cells)

    body = "\n".join(f"<tr>{row('td', r)}</tr>" for r in table.itertuples(index=False))
    head = f"<tr>{row('th', table.columns)}</tr>"
    return f'<div class="wide"><table>\n{head}\n{body}\n</table></div>'


def html_bytes(
    title: str,
    figures: Sequence[tuple[str, "go.Figure"]],
    notes: Sequence[str] = (),
    command: str = "",
) -> bytes:
    """Figures as a page that opens offline in any browser.

    Args:
        title: heading of the page.
        figures: (heading, figure) pairs.
        notes: paragraphs above the figures, plain text.
        command: the command line that gives the same run.
    """
    first = Section("", [*notes, *([Code(command)] if command else [])])
    return html_page(title, [first, *(Section(heading, [figure]) for heading, figure in figures)])
