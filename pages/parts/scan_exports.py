"""What a scan leaves: every table as CSV and Parquet, every figure as a file, one report."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import streamlit as st

from pages.parts.scans import Scan
from zo_core import export
from zo_core.analysis.outliers import Verdict
from zo_core.analysis.outliers.agreement import rules_table
from zo_core.errors import UserError
from zo_core.jobs import command_line
from zo_core.reports.images import NO_CHROMIUM, find_chromium, image_bytes
from zo_core.reports.scan import scan_report

if TYPE_CHECKING:
    import plotly.graph_objects as go

ABOUT = {
    "layers": "block output by layer",
    "parts": "the same statistics of all four parts",
    "rules": "what each rule says, with its numbers",
    "channels": "largest magnitude by layer and channel",
    "tokens": "largest magnitude by layer and token",
    "weights": "down-projections, weights only",
    "owl": "shares of Wanda scores by layer",
}
FORMATS = {"html": "text/html", "png": "image/png", "svg": "image/svg+xml"}


def exports(
    scan: Scan,
    verdicts: Mapping[str, Verdict],
    figures: Mapping[str, "go.Figure"],
) -> None:
    """The export section of a scan.

    Args:
        scan: the scan.
        verdicts: what every rule says with the thresholds of this page.
        figures: as drawn on this page, by title.
    """
    st.subheader("Export", anchor=False)
    run_id = scan.entry.run_id
    tables = {"rules": rules_table(verdicts), "tokens": scan.tokens, **scan.tables.named()}
    with st.container(key="scan_downloads"):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            name = st.selectbox(
                "Table",
                [n for n in ABOUT if n in tables],
                format_func=lambda n: f"{n}: {ABOUT[n]}",
                key="export_table",
                width=380,
            )
            table = tables[name]
            _button("CSV", lambda: export.csv_bytes(table), f"{run_id}-{name}.csv", "text/csv")
            _button(
                "Parquet",
                lambda: export.parquet_bytes(table),
                f"{run_id}-{name}.parquet",
                "application/vnd.apache.parquet",
            )
        with st.container(horizontal=True, vertical_alignment="bottom"):
            title = st.selectbox("Figure", list(figures), key="export_figure", width=380)
            _figure(scan, title, figures[title])
        with st.container(horizontal=True, vertical_alignment="center"):
            _button(
                "Report (HTML)",
                lambda: scan_report(
                    scan.entry.run, {n: dict(v.parameters) for n, v in verdicts.items()}
                ),
                f"{run_id}-report.html",
                "text/html",
                "Figures, rules, settings, versions and hardware in one file that opens offline",
            )
            _button("summary.json", lambda: _summary(scan), f"{run_id}.json", "application/json")
            _button("Raw scan (zip)", scan.entry.run.zip_bytes, f"{run_id}.zip", "application/zip")
    part = scan.covered
    st.caption(
        "Layers are 0-based; layer -1 is the embedding output. What the columns are: docs/scan.md."
        + (f" tokens: of the {part}." if part else "")
    )


def _figure(scan: Scan, title: str, figure: "go.Figure") -> None:
    stem = f"{scan.entry.run_id}-{title.lower().replace(' ', '-').replace(',', '')}"
    _button(
        "HTML",
        lambda: export.html_bytes(
            f"{title}: {scan.title}",
            [(title, figure)],
            [f"Run {scan.entry.run_id}. Layers are 0-based."],
            command_line(scan.entry.job),
        ),
        f"{stem}.html",
        FORMATS["html"],
    )
    if find_chromium() is None:
        st.caption(NO_CHROMIUM)
        return
    for form in ("png", "svg"):
        _button(
            form.upper(),
            lambda form=form: _image(figure, form),
            f"{stem}.{form}",
            FORMATS[form],
            "Drawn by the Chromium on the machine of this app: takes some seconds",
        )


def _image(figure: "go.Figure", form: str) -> bytes:
    try:
        return image_bytes(figure, form)  # type: ignore[arg-type]
    except UserError as error:  # a download cannot show a message of its own
        return f"{error}\n".encode()


def _summary(scan: Scan) -> bytes:
    entry = scan.entry
    facts = {"run_id": entry.run_id, "job": entry.job.model_dump(mode="json")} | entry.summary
    return export.json_bytes(facts | {"provenance": entry.run.result_json("provenance.json")})


def _button(
    label: str, data: Callable[[], bytes], name: str, mime: str, help_text: str | None = None
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
    )
