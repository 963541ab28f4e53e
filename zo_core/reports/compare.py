"""The report of a comparison: one HTML file with verdict, tables, figures, settings, versions."""

from typing import Any

import pandas as pd

from zo_core import plots
from zo_core.compare.files import as_yaml
from zo_core.compare.markdown import search_notes
from zo_core.compare.reader import Facts
from zo_core.compare.store import Comparison
from zo_core.errors import UserError
from zo_core.export import Code, Section, html_page

MEASURED = ["arm", "lr", "n", "missing", "mean", "sd", "steps", "forward_passes", "note"]
PAIRED = ["arm", "pairs", "difference", "low", "high", "p", "p_holm", "p_wilcoxon", "effect"]
POINTS = ["mean", "sd", "difference", "low", "high"]


def comparison_report(comparison: Comparison) -> bytes:
    """Everything about a comparison, as far as it is, in one HTML file that opens offline.

    Raises:
        UserError: it has no tables yet.
    """
    facts = Facts.read(comparison)
    if facts is None:
        raise UserError(
            f"Comparison {comparison.comparison_id} has no tables yet: they are there a few "
            "seconds after it has started; --resume writes those of an earlier version anew."
        )
    status, spec = comparison.status(), facts.spec
    done = f"{status.done} of {status.total} cells done" if status.total else ""
    sections = [
        Section(
            "",
            [
                f"Comparison {comparison.comparison_id}, {status.state}. {done}".strip(),
                f"Tasks {', '.join(spec.tasks)}; seeds {', '.join(map(str, spec.seeds))}; "
                f"{facts['budget']} forward passes a run. Metrics and differences in points.",
            ],
        ),
        Section("Verdict", _verdict(facts)),
        *(_task(facts, task) for task in facts.tasks),
        *_layers(facts),
    ]
    precision = facts.table("precision")
    if len(precision):
        sections.append(Section("Precision", [_points(precision)]))
    search = facts.table("search")
    sections += [
        Section("Learning rates", [*search_notes(facts.all), *([search] if len(search) else [])]),
        Section("Settings", [Code(as_yaml(spec))]),
        Section("Versions and hardware", [_flat(facts["provenance"])]),
        Section(
            "Reproduce",
            [
                "The command that began it, and one that begins it anywhere, with the settings "
                "above saved as spec.yaml:",
                Code(f"{facts['command']}\npython -m zo_core compare spec.yaml"),
            ],
        ),
    ]
    return html_page(spec.title or comparison.comparison_id, sections)


def _verdict(facts: Facts) -> list[Any]:
    items: list[Any] = [f"{c['text']}: {c['sentence']}" for c in facts["claims"]]
    items += [facts["power"]] if facts["power"] else []
    runs = [{"claim": c["key"], "runs": " ".join(c["run_ids"])} for c in facts["claims"]]
    return [*items, pd.DataFrame(runs)] if runs else ["No claim: its arms are not compared."]


def _task(facts: Facts, task: str) -> Section:
    arms = facts.arms(task)
    items: list[Any] = [_points(arms[MEASURED]), _points(arms[PAIRED])]
    items.append(plots.differences(arms, facts["baseline"], facts.spec.margin))
    curves = facts.curves
    curves = curves[curves["task"] == task]
    if len(curves):
        items.append(plots.small_multiples(curves, facts.tuned_arms, facts["baseline"]))
    return Section(f"Task {task}", items)


def _layers(facts: Facts) -> list[Section]:
    """A figure a task of the gain by layer, and what foretells it."""
    if not facts.sweeps:
        return []
    items: list[Any] = []
    for task in facts.sweeps:
        items += [f"Task {task}", plots.layer_sweep(*facts.sweep(task))]
    found = facts.table("correlations")
    items += [found] if len(found) else []
    return [Section("Gain by layer", items)]


def _points(table: pd.DataFrame) -> pd.DataFrame:
    """Shares as points."""
    shares = [name for name in POINTS if name in table]
    return table.assign(**{name: 100 * table[name].astype(float) for name in shares})


def _flat(facts: dict[str, Any]) -> pd.DataFrame:
    rows = [
        (f"{name} {inner}", str(value))
        for name, values in facts.items()
        for inner, value in (values if isinstance(values, dict) else {"": values}).items()
    ]
    return pd.DataFrame(rows, columns=["what", "value"])
