"""The tables of a comparison: one row an arm and task, one row a cell, and the verdict."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pandas as pd

from zo_core.compare.markdown import markdown
from zo_core.compare.power import power_note
from zo_core.compare.precision import precision_table
from zo_core.compare.profile import (
    GAINS,
    activation_profile,
    correlations,
    layer_gains,
    sensitivity_profile,
)
from zo_core.compare.reader import ALL
from zo_core.compare.results import Results, provenance_of
from zo_core.compare.spec import Arm
from zo_core.compare.stats import Paired, compare, holm, summarise
from zo_core.compare.store import Comparison
from zo_core.compare.verdict import verdict
from zo_core.export import csv_bytes, json_bytes, parquet_bytes
from zo_core.runs import to_json

SEARCH = ["task", "arm", "lr", "dev_loss", "chosen", "added", "forward_passes"]


def arm_table(results: Results) -> pd.DataFrame:
    """One row an arm and task (and one over all tasks): results, and the paired difference.

    ``p_holm`` is corrected over all arms of the same task.
    """
    rows = []
    for task in results.tasks:
        baseline = results.spec.baseline_arm
        against = results.values(baseline.name, task)
        arms = results.spec.arms
        paired = [
            None if arm is baseline else compare(results.values(arm.name, task), against)
            for arm in arms
        ]
        corrected = holm([None if found is None else found.p for found in paired])
        rows += [
            _row(results, arm, task, found, p)
            for arm, found, p in zip(arms, paired, corrected, strict=True)
        ]
    return pd.DataFrame(rows)


def _row(
    results: Results, arm: Arm, task: str | None, paired: Paired | None, p_holm: float | None
) -> dict[str, Any]:
    cells = results.of(arm.name, task)
    value, before = summarise([m.value for m in cells]), summarise([m.before for m in cells])
    choices = [c for (t, a), c in results.choices.items() if a == arm.name and task in (t, None)]
    row: dict[str, Any] = {
        "task": task or ALL,
        "arm": arm.name,
        "scope": arm.scope,
        "resolved_scope": _common([m.resolved_scope for m in cells if m.resolved_scope]),
        "optimizer": arm.optimizer if arm.tunes else None,
        "lr": _common([m.lr for m in cells]),
        "lr_at_edge": _at_edge(results, arm, task),
        "lr_added": sum(c.added for c in choices),
        "metric": _common([m.metric for m in cells if m.metric]),
        "n": value.n,
        "missing": len(cells) - value.n,
        "mean": value.mean,
        "sd": value.sd,
        "before": before.mean,
        "loss": summarise([m.loss for m in cells]).mean,
        "steps": _common([m.steps for m in cells]),
        "budget": results.spec.budget() if arm.tunes else 0,
        "search_budget": sum(len(c.dev_losses) for c in choices) * results.spec.budget(True),
        "forward_passes": _common([m.forward_passes for m in cells if m.forward_passes]),
        "steps_per_second": summarise([m.steps_per_second for m in cells]).mean,
        "tuned_parameters": _common([m.tuned_parameters for m in cells if m.tuned_parameters]),
    }
    facts = asdict(paired) if paired else {}
    row |= {
        "difference": facts.get("mean"),
        "low": facts.get("low"),
        "high": facts.get("high"),
        "pairs": facts.get("n"),
        "p": facts.get("p"),
        "p_holm": p_holm,
        "p_wilcoxon": facts.get("p_wilcoxon"),
        "smallest_p": facts.get("smallest_p"),
        "effect": facts.get("effect"),
    }
    errors = [m.error for m in cells if m.error]
    row["note"] = "; ".join(dict.fromkeys([*errors, *filter(None, [facts.get("reason")])]))
    return row


def _common(values: list[Any]) -> Any:
    """The value if there is only one, else None."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _at_edge(results: Results, arm: Arm, task: str | None) -> bool | None:
    choice = results.choices.get((task, arm.name)) if task else None
    return choice.at_edge if choice and choice.dev_losses else None


def search_table(results: Results) -> pd.DataFrame:
    """One row a learning rate that was tried: its dev loss, and whether it was chosen.

    ``added``: it was not of the grid, which grew because its best rate was at the edge.
    """
    rows = []
    for (task, arm), choice in results.choices.items():
        given = results.spec.grid(results.spec.arm(arm))
        rows += [
            (task, arm, lr, loss, lr == choice.lr, lr not in given, results.spec.budget(True))
            for lr, loss in choice.dev_losses.items()
        ]
    return pd.DataFrame(rows, columns=SEARCH)


def as_dict(comparison: Comparison, results: Results) -> dict[str, Any]:
    """Everything about a comparison: what ``table.json`` and ``compare --json`` hold."""
    table, gains = arm_table(results), layer_gains(results)
    activation, sensitivity = activation_profile(results), sensitivity_profile(results)
    claims = verdict(results)
    decided_together = sum(claim.key != "e" for claim in claims)
    return {
        "comparison_id": comparison.comparison_id,
        "path": str(comparison.path),
        "command": comparison.command,
        "spec": results.spec.model_dump(mode="json"),
        "budget": results.spec.budget(),
        "search_budget": results.spec.budget(searching=True),
        "dominant": results.dominant,
        "baseline": results.spec.baseline_arm.name,
        "arms": _records(table),
        "cells": [asdict(m) for m in results.measurements],
        "layers": _records(gains),
        "scan": results.scan,
        "probes": results.probes,
        "activation": _records(activation),
        "sensitivity": _records(sensitivity),
        "correlations": _records(correlations(gains, activation, sensitivity)),
        "precision": _records(precision_table(results)),
        "searches": any(len(results.spec.grid(arm)) > 1 for arm in results.spec.arms if arm.tunes),
        "search": _records(search_table(results)),
        "claims": [asdict(claim) for claim in claims],
        "power": power_note(len(results.units), decided_together, results.spec.alpha)
        if decided_together
        else "",
        "provenance": _provenance(results),
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    plain = table.astype(object)
    return plain.where(plain.notna(), None).to_dict("records")


def _provenance(results: Results) -> dict[str, Any]:
    facts = dict(provenance_of(results))
    facts.pop("job", None)
    facts.pop("run_id", None)
    facts.setdefault("python", platform.python_version())
    packages = {"scipy": version("scipy"), **facts.get("packages", {})}
    return facts | {"packages": packages}


def write_tables(comparison: Comparison, facts: dict[str, Any]) -> None:
    """Write the tables as CSV, Parquet, JSON and Markdown into the folder.

    Raises:
        OSError: the folder cannot be written.
    """
    tables = {
        "table": pd.DataFrame(facts["arms"]),
        "measurements": pd.DataFrame(facts["cells"]),
        "search": pd.DataFrame(facts["search"], columns=SEARCH),
        "layers": pd.DataFrame(facts["layers"], columns=GAINS),
    }
    for name, table in tables.items():
        comparison.write(f"{name}.csv", csv_bytes(table))
    for name in ("table", "measurements"):
        comparison.write(f"{name}.parquet", parquet_bytes(tables[name]))
    comparison.write("table.md", markdown(facts))
    strict: dict[str, Any] = json.loads(to_json(facts))  # NaN becomes null
    comparison.write("table.json", json_bytes(strict))
