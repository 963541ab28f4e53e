"""Outlier rules: which layer is the first activation-outlier layer, and why.

Every rule reads the tables of one stored scan (docs/scan.md), so a changed threshold needs no new
forward pass. No torch here: the pages call it directly. Definitions: docs/outliers.md.
"""

from dataclasses import replace

import pandas as pd

from zo_core.analysis.outliers.emergence import EMERGENCE
from zo_core.analysis.outliers.features import INT8
from zo_core.analysis.outliers.magnitudes import DOWN_INPUT, MASSIVE, SYSTEMATIC
from zo_core.analysis.outliers.robust import ZSCORE
from zo_core.analysis.outliers.rule import RuleSpec, ScanTables, Verdict, ill_defined, none
from zo_core.analysis.outliers.weights import DOWN_WEIGHTS, OWL, OWL_M

__all__ = ["OWL_M", "RULES", "RuleSpec", "ScanTables", "Verdict", "first_outlier_layer"]

RULES: dict[str, RuleSpec] = {
    rule.name: rule
    for rule in (EMERGENCE, MASSIVE, SYSTEMATIC, ZSCORE, DOWN_INPUT, INT8, DOWN_WEIGHTS, OWL)
}

NEWEST = {"channels": "tokens6", "weights": "column_peak"}
"""A column that scans of earlier versions lack in a table that they have."""


def first_outlier_layer(
    rule: str, tables: ScanTables | pd.DataFrame, **parameters: float
) -> Verdict:
    """Apply a rule to the tables of a scan.

    Args:
        rule: a key of :data:`RULES`.
        tables: the scan's tables; a layer table alone is enough for rules that need no other.
        **parameters: thresholds that replace the rule's defaults.

    Raises:
        ValueError: unknown rule or parameter.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown: choose one of {', '.join(RULES)}.")
    spec = RULES[rule]
    unknown = set(parameters) - set(spec.parameters)
    if unknown:
        raise ValueError(f"rule {rule} has no parameter {', '.join(sorted(unknown))}.")
    if isinstance(tables, pd.DataFrame):
        tables = ScanTables(tables)
    settings = {**spec.parameters, **parameters}
    return replace(_judge(spec, tables, settings), parameters=settings)


def _judge(spec: RuleSpec, tables: ScanTables, settings: dict[str, float]) -> Verdict:
    if not _has(tables, spec.needs):
        return Verdict(
            None,
            f"Not known: this scan was made without {spec.needs}.parquet as it is now: scan again.",
            "missing",
        )
    if spec.kind == "weight":
        return spec.apply(tables, **settings)
    layers = tables.layers
    broken = layers[layers["nonfinite"] > 0] if "nonfinite" in layers else layers[:0]
    if not broken.empty:
        row = broken.sort_values("layer").iloc[0]
        return ill_defined(
            f"layer {int(row['layer'])} has {int(row['nonfinite'])} NaN or infinite activations "
            "(overflow in float16?): scan in bfloat16 or float32.",
            nonfinite=float(row["nonfinite"]),
        )
    usable = layers[(layers["median"] > 0) & (layers["mean"] > 0)]
    if usable[usable["layer"] >= 0].empty:
        return none("no layer has finite activations above 0.")
    return spec.apply(tables, **settings)


def _has(tables: ScanTables, name: str) -> bool:
    table = getattr(tables, name)
    # Scans of earlier versions have such a table with fewer columns.
    return table is not None and NEWEST.get(name, "layer") in table
