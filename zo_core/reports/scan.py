"""The report of an activation scan: figures, rules, settings and versions."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from zo_core import plots
from zo_core.analysis.outliers import RULES, ScanTables
from zo_core.analysis.outliers.agreement import consensus, judge_all, rules_table
from zo_core.analysis.outliers.weights import owl_weights
from zo_core.errors import UserError
from zo_core.export import Section
from zo_core.reports.parts import PARTS, named, unit
from zo_core.reports.stored import about_run, origin
from zo_core.runs import Run


def scan_sections(
    run: Run, parameters: Mapping[str, Mapping[str, float]] | None = None
) -> list[Section]:
    """Everything about one scan; the first paragraph is what it found.

    Args:
        run: a finished scan.
        parameters: thresholds that replace the defaults of rules.

    Raises:
        UserError: it has not finished, or its tables cannot be read.
    """
    if run.status().state != "done":
        raise UserError(f"run: {run.run_id} is {run.status().state}: a report needs a whole scan.")
    try:
        tables = ScanTables.read(run.result)
        tokens = pd.read_parquet(run.result("tokens.parquet"))
    except (OSError, ValueError) as error:
        raise UserError(f"run: the tables of {run.run_id} cannot be read: {error}.") from error
    summary = run.result_json() or {}
    verdicts = judge_all(tables, parameters)
    first = verdicts["emergence"].layer
    named = "no layer" if first is None else f"layer {first}"
    rules = rules_table(verdicts)
    answers = (summary.get("published") or {}).get("answers", [])
    return [
        Section(
            "",
            [
                f"The emergence rule names {named}. {verdicts['emergence'].reason}",
                consensus(verdicts),
                *(f"{summary['published']['name']}, {a['sentence']}." for a in answers),
                f"{about_run(run)} Layers are 0-based; layer -1 is the embedding output.",
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
        *origin(run, ("n_sequences", "n_tokens", "dtype", "device", "bos", "seconds")),
    ]


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
    for part in PARTS:
        channels = tables.channels_of(part)
        if not channels.empty:
            figure = plots.channel_heatmap(
                channels, first, unit=unit(part), n_layers=int(tables.layers["layer"].max()) + 1
            )
            sections.append(Section(f"Layer by {unit(part)}, {named(part)}", [figure]))
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
