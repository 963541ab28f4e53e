"""All rules side by side: the layer that each names, its numbers, and how many agree."""

from collections import Counter
from collections.abc import Mapping

import pandas as pd

from zo_core.analysis.outliers import RULES, ScanTables, Verdict, first_outlier_layer

Verdicts = Mapping[str, Verdict]
STATES = {
    "none": "none found",
    "ill-defined": "ill-defined",
    "missing": "not in this scan",
}
"""How a verdict without a layer is written."""


def judge_all(
    tables: ScanTables, parameters: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Verdict]:
    """What every rule says, with its own thresholds where they are given."""
    given = parameters or {}
    return {name: first_outlier_layer(name, tables, **given.get(name, {})) for name in RULES}


def voters(verdicts: Verdicts) -> dict[str, Verdict]:
    """The rules that could have said none: a weighting always has a largest layer."""
    return {
        name: verdict
        for name, verdict in verdicts.items()
        if RULES[name].kind != "weighting" and verdict.state != "missing"
    }


def votes(verdicts: Verdicts) -> Counter[int]:
    """How many rules name each layer; weightings do not vote."""
    return Counter(v.layer for v in voters(verdicts).values() if v.layer is not None)


def consensus(verdicts: Verdicts) -> str:
    """The agreement in one sentence."""
    counted, asked = votes(verdicts), len(voters(verdicts))
    if not counted:
        return f"None of {asked} rules names a layer."
    parts = [
        f"{count} of {asked} rules name{'s' if count == 1 else ''} layer {layer}"
        for layer, count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    ]
    silent = asked - sum(counted.values())
    if silent:
        parts.append(f"{silent} name{'s' if silent == 1 else ''} none")
    return "; ".join(parts) + "."


def rules_table(verdicts: Verdicts) -> pd.DataFrame:
    """One row a rule.

    Returns:
        ``rule, title, kind, state, layer`` (null unless found), ``agree`` (rules that name the same
        layer, this one included; null for weightings and where no layer is named), ``reason,
        numbers, parameters`` (``name = value``, comma separated), ``source``.
    """
    counted = votes(verdicts)
    rows = []
    for name, verdict in verdicts.items():
        spec = RULES[name]
        votes_here = spec.kind != "weighting" and verdict.layer is not None
        rows.append(
            {
                "rule": name,
                "title": spec.title,
                "kind": spec.kind,
                "state": verdict.state,
                "layer": verdict.layer,
                "agree": counted[verdict.layer]
                if votes_here and verdict.layer is not None
                else None,
                "reason": verdict.reason,
                "numbers": written(verdict.numbers),
                "parameters": written(verdict.parameters),
                "source": spec.source,
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({"layer": "Int64", "agree": "Int64"})


def written(numbers: Mapping[str, float]) -> str:
    """Numbers as ``name = value``, comma separated."""
    return ", ".join(f"{name} = {value:.4g}" for name, value in numbers.items())
