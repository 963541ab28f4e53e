"""The tables of a comparison: one row an arm and task, one row a cell, and the verdict."""

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pandas as pd

from zo_core.compare.profile import layer_gains
from zo_core.compare.results import Results, provenance_of
from zo_core.compare.spec import Arm
from zo_core.compare.stats import Paired, compare, holm, summarise
from zo_core.compare.store import Comparison
from zo_core.compare.verdict import verdict
from zo_core.export import csv_bytes, json_bytes

ALL = "all"
"""The task column of rows over all tasks, where there are several."""


def arm_table(results: Results) -> pd.DataFrame:
    """One row an arm and task (and one over all tasks): results, and the paired difference.

    ``p_holm`` is corrected over all arms of the same task.
    """
    tasks: list[str | None] = [*results.spec.tasks]
    if len(tasks) > 1:
        tasks.append(None)
    rows = []
    for task in tasks:
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
    row: dict[str, Any] = {
        "task": task or ALL,
        "arm": arm.name,
        "scope": arm.scope,
        "resolved_scope": _common([m.resolved_scope for m in cells if m.resolved_scope]),
        "optimizer": arm.optimizer if arm.tunes else None,
        "lr": _common([m.lr for m in cells]),
        "lr_at_edge": _at_edge(results, arm, task),
        "metric": _common([m.metric for m in cells if m.metric]),
        "n": value.n,
        "missing": len(cells) - value.n,
        "mean": value.mean,
        "sd": value.sd,
        "before": before.mean,
        "loss": summarise([m.loss for m in cells]).mean,
        "steps": _common([m.steps for m in cells]),
        "budget": results.spec.budget() if arm.tunes else 0,
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
    """One row a learning rate that was tried: its dev loss, and whether it was chosen."""
    return pd.DataFrame(
        [
            {"task": task, "arm": arm, "lr": lr, "dev_loss": loss, "chosen": lr == choice.lr}
            for (task, arm), choice in results.choices.items()
            for lr, loss in choice.dev_losses.items()
        ],
        columns=["task", "arm", "lr", "dev_loss", "chosen"],
    )


def as_dict(comparison: Comparison, results: Results) -> dict[str, Any]:
    """Everything about a comparison: what ``table.json`` and ``compare --json`` hold."""
    table = arm_table(results)
    return {
        "comparison_id": comparison.comparison_id,
        "path": str(comparison.path),
        "command": comparison.command,
        "spec": results.spec.model_dump(mode="json"),
        "budget": results.spec.budget(),
        "dominant": results.dominant,
        "baseline": results.spec.baseline_arm.name,
        "arms": _records(table),
        "cells": [asdict(m) for m in results.measurements],
        "layers": _records(layer_gains(results)),
        "search": _records(search_table(results)),
        "claims": [asdict(claim) for claim in verdict(results)],
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


def markdown(facts: dict[str, Any]) -> str:
    """The tables as Markdown, with the command, versions and hardware."""
    where, spec = facts["provenance"], facts["spec"]
    lines = [
        f"# {spec['title'] or facts['comparison_id']}",
        "",
        "```",
        facts["command"],
        "```",
        "",
        f"Tasks {', '.join(spec['tasks'])}; seeds {', '.join(map(str, spec['seeds']))}; "
        f"{facts['budget']} forward passes a run; differences are to `{facts['baseline']}`, in "
        "points, with 95 % bootstrap intervals; p: exact sign flips, corrected by Holm.",
        "",
        "| task | arm | lr | n | mean | sd | difference | p | d_z |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_markdown_row(row) for row in facts["arms"]]
    notes = [f"* {r['arm']} ({r['task']}): {r['note']}" for r in facts["arms"] if r["note"]]
    edges = [f"`{r['arm']}` ({r['task']})" for r in facts["arms"] if r["lr_at_edge"]]
    if edges:
        notes.append(
            f"* The learning rate is at the edge of its grid, so a better one may lie outside: "
            f"{', '.join(edges)}."
        )
    lines += ["", *notes] if notes else []
    if facts["claims"]:
        lines += ["", "## Verdict", ""]
        lines += [f"* {c['text']}: **{c['decision']}**{_rest(c)}" for c in facts["claims"]]
    packages = ", ".join(f"{name} {v}" for name, v in where["packages"].items())
    device = where.get("device_name", "unknown device")
    lines += [
        "",
        f"Model {spec['common'].get('model', 'demo')} ({where.get('dtype', 'unknown dtype')}) on "
        f"{device}; Python {where['python']}, {packages}.",
        "",
    ]
    return "\n".join(lines)


def _rest(claim: dict[str, Any]) -> str:
    return claim["sentence"].removeprefix(claim["decision"])


def _markdown_row(row: dict[str, Any]) -> str:
    difference = _points(row["difference"], sign=True)
    if row["low"] is not None:
        low, high = _points(row["low"], sign=True), _points(row["high"], sign=True)
        difference += f" [{low}, {high}]"
    cells = [
        row["task"],
        row["arm"].replace("|", "\\|"),
        "" if row["lr"] is None else f"{row['lr']:g}",
        str(row["n"]) + (f" ({row['missing']} missing)" if row["missing"] else ""),
        _points(row["mean"]),
        _points(row["sd"]),
        difference,
        "" if row["p_holm"] is None else f"{row['p_holm']:.3g}",
        "" if row["effect"] is None else f"{row['effect']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _points(value: float | None, sign: bool = False) -> str:
    """A share in points (hundredths)."""
    if value is None:
        return ""
    return f"{100 * value:+.2f}" if sign else f"{100 * value:.2f}"


def write_tables(comparison: Comparison, facts: dict[str, Any]) -> dict[str, bytes]:
    """Write ``table.csv``, ``table.json``, ``table.md``, ``measurements.csv`` into the folder.

    Returns:
        The files by name, so that they can be written elsewhere as well.
    """
    files = {
        "table.csv": csv_bytes(pd.DataFrame(facts["arms"])),
        "measurements.csv": csv_bytes(pd.DataFrame(facts["cells"])),
        "search.csv": csv_bytes(
            pd.DataFrame(facts["search"], columns=["task", "arm", "lr", "dev_loss", "chosen"])
        ),
        "table.json": json_bytes(facts),
        "table.md": markdown(facts).encode(),
    }
    for name, data in files.items():
        comparison.write(name, data)
    return files
