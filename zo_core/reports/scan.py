"""The report of an activation scan: one HTML file with figures, rules, settings and versions."""

from typing import Any

import pandas as pd

from zo_core import plots
from zo_core.analysis.outliers import RULES, ScanTables
from zo_core.analysis.outliers.agreement import consensus, judge_all, rules_table
from zo_core.analysis.outliers.weights import owl_weights
from zo_core.errors import UserError
from zo_core.export import Code, Section, html_page
from zo_core.jobs import ScanJob, command_line
from zo_core.runs import Run

PARTS = {
    "block_output": "Block output",
    "attention_output": "Attention output",
    "mlp_output": "MLP output",
    "down_input": "Down-projection input",
}


def scan_report(run: Run, parameters: dict[str, dict[str, float]] | None = None) -> bytes:
    """Everything about one scan in one HTML file that opens offline.

    Args:
        run: a finished scan.
        parameters: thresholds that replace the defaults of rules.

    Raises:
        UserError: the run is no scan, has not finished, or its tables cannot be read.
    """
    job = run.job
    if not isinstance(job, ScanJob):
        raise UserError(f"run: {run.run_id} is a {job.kind}, no scan: choose a scan.")
    if run.status().state != "done":
        raise UserError(f"run: {run.run_id} is {run.status().state}: a report needs a whole scan.")
    try:
        tables = ScanTables.read(run.result)
        tokens = pd.read_parquet(run.result("tokens.parquet"))
    except (OSError, ValueError) as error:
        raise UserError(f"run: the tables of {run.run_id} cannot be read: {error}.") from error
    summary, facts = run.result_json() or {}, run.result_json("provenance.json") or {}
    verdicts = judge_all(tables, parameters)
    first = verdicts["emergence"].layer
    named = "no layer" if first is None else f"layer {first}"
    rules = rules_table(verdicts)
    answers = (summary.get("published") or {}).get("answers", [])
    sections = [
        Section(
            "",
            [
                f"The emergence rule names {named}. {verdicts['emergence'].reason}",
                consensus(verdicts),
                *(f"{summary['published']['name']}, {a['sentence']}." for a in answers),
                f"Run {run.run_id}. Layers are 0-based; layer -1 is the embedding output.",
            ],
        ),
        Section(
            "Rules",
            [
                plots.named_layers(rules, len(tables.layers) - 1, _published_layer(answers)),
                rules.drop(columns=["rule", "source"]),
                *(
                    f"{RULES[r].title}: {RULES[r].definition} Source: {RULES[r].source}."
                    for r in RULES
                ),
            ],
        ),
        *_parts(tables, first),
        *_heatmaps(tables, tokens, first),
        *_owl(tables, first, verdicts["owl"].parameters["m"]),
        Section("Settings", [_facts(job.model_dump(mode="json")), _facts(_measured(summary))]),
        Section("Versions and hardware", [_facts(_flat(facts))]),
        Section("Reproduce", [Code(command_line(job))]),
    ]
    return html_page(f"Activation scan of {job.model}", sections)


def _published_layer(answers: list[dict[str, Any]]) -> int | None:
    return next((a["layer"] for a in answers if a["layer"] is not None), None)


def _parts(tables: ScanTables, first: int | None) -> list[Section]:
    if tables.parts is None:
        return [Section("Profile by layer", [plots.profile(tables.layers, first)])]
    sections = []
    for part, title in PARTS.items():
        table = tables.parts[tables.parts["part"] == part]
        if not table.empty:
            figures = [plots.profile(table, first), plots.kurtosis(table, first)]
            sections.append(Section(f"{title}: magnitudes and kurtosis by layer", figures))
    return sections


def _heatmaps(tables: ScanTables, tokens: pd.DataFrame, first: int | None) -> list[Section]:
    sections = []
    channels = tables.channels_of("block_output")
    if not channels.empty:
        figure = plots.channel_heatmap(channels, first)
        sections.append(Section("Layer by channel, block output", [figure]))
    if not tokens.empty:
        sequence = int(tokens["sequence"].min())
        figure = plots.token_heatmap(tokens, sequence, first=first)
        sections.append(
            Section(f"Layer by token, block output, sequence {sequence}, first tokens", [figure])
        )
    return sections


def _owl(tables: ScanTables, first: int | None, m: float) -> list[Section]:
    if tables.owl is None or tables.owl.empty:
        return []
    return [Section("OWL weighting", [plots.layer_weights(owl_weights(tables.owl, m), m, first)])]


def _measured(summary: dict[str, Any]) -> dict[str, Any]:
    names = ("n_sequences", "n_tokens", "dtype", "device", "bos", "seconds")
    return _flat({name: summary[name] for name in names if name in summary})


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """Nested facts as ``outer.inner``; the job has a table of its own."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, dict) and name != "job":
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        elif name != "job":
            flat[name] = value
    return flat


def _facts(facts: dict[str, Any]) -> pd.DataFrame:
    rows = [(name, str(value)) for name, value in facts.items() if value is not None]
    return pd.DataFrame(rows, columns=["setting", "value"])
