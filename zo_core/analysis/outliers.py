"""Outlier rules: which layer is the first activation-outlier layer, and why.

Every rule reads one table (``results/layers.parquet`` of a scan; see docs/run-store.md), so a
changed threshold needs no new forward pass. No torch here: the pages call it directly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says of a model: a 0-based layer, or None, with the numbers behind it."""

    layer: int | None
    reason: str
    parameters: dict[str, float]


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A rule with its exact definition and default parameters."""

    name: str
    title: str
    definition: str
    source: str
    parameters: dict[str, float]
    apply: Callable[..., tuple[int | None, str]]


def _emergence(
    layers: pd.DataFrame, jump: float, ratio: float, persist: float
) -> tuple[int | None, str]:
    """First layer that is prominent, far above every earlier one, and stays.

    With r(k) = top-1 / median of layer k's block output (r(-1): the embedding output), layer k
    is named if r(k) >= ratio, r(k) >= jump x max r(j<k), and top-1 stays at or above half of
    layer k's through the next ``persist`` layers.
    """
    table = layers.set_index("layer").sort_index()
    r = table["top1"] / table["median"]
    blocks = [int(k) for k in table.index if k >= 0]
    prominent = [k for k in blocks if r[k] >= ratio]
    if not prominent:
        best = max(blocks, key=lambda k: r[k])
        return None, (
            f"None found: top-1 is at most {r[best]:.0f} x the median (layer {best}); "
            f"the rule asks for {ratio:g} x."
        )
    for k in prominent:
        before = r[r.index < k].max() if (r.index < k).any() else 0.0
        following = [j for j in blocks if k < j <= k + persist]
        stays = len(following) == int(persist) and all(
            table["top1"][j] >= table["top1"][k] / 2 for j in following
        )
        if r[k] >= jump * before and stays:
            return k, (
                f"top-1 is {table['top1'][k]:.0f}, {r[k]:.0f} x the median of layer {k}; every "
                f"earlier layer is at most {before:.0f} x, and it stays for the next "
                f"{int(persist)} layers."
            )
    first = prominent[0]
    return None, (
        f"Ill-defined: top-1 passes {ratio:g} x the median at layer {first}, but no layer both "
        f"jumps {jump:g} x above all earlier ones and stays for {int(persist)} layers: it grows "
        "gradually or does not last."
    )


def _massive(layers: pd.DataFrame, magnitude: float, ratio: float) -> tuple[int | None, str]:
    return _first_above(layers, "median", magnitude, ratio)


def _systematic(layers: pd.DataFrame, ratio: float) -> tuple[int | None, str]:
    return _first_above(layers, "mean", 0.0, ratio)


def _first_above(
    layers: pd.DataFrame, base: str, magnitude: float, ratio: float
) -> tuple[int | None, str]:
    """First layer whose top-1 exceeds ``magnitude`` and is >= ``ratio`` x its ``base`` column."""
    blocks = layers[layers["layer"] >= 0].sort_values("layer")
    relative = blocks["top1"] / blocks[base]
    hit = blocks[(blocks["top1"] > magnitude) & (relative >= ratio)]
    if hit.empty:
        best = relative.idxmax()
        row = blocks.loc[best]
        return None, (
            f"None found: layer {int(row['layer'])} comes closest with top-1 {row['top1']:.0f}, "
            f"{relative[best]:.0f} x the {base}; the rule asks for {ratio:g} x"
            + (f" and more than {magnitude:g}." if magnitude else ".")
        )
    row = hit.iloc[0]
    return int(row["layer"]), (
        f"top-1 is {row['top1']:.0f}, {row['top1'] / row[base]:.0f} x the {base} of layer "
        f"{int(row['layer'])}; no earlier layer meets the rule."
    )


RULES: dict[str, RuleSpec] = {
    rule.name: rule
    for rule in (
        RuleSpec(
            "emergence",
            "Emergence",
            "The first layer whose top-1 is at least `ratio` x the median magnitude of its block "
            "output, whose top-1 / median is at least `jump` x that of every earlier layer (the "
            "embedding output included), and whose top-1 does not fall below half in the next "
            "`persist` layers.",
            "ZOScope (docs/outlier-rules.md)",
            {"jump": 2.0, "ratio": 100.0, "persist": 3.0},
            _emergence,
        ),
        RuleSpec(
            "massive",
            "Massive activations",
            "The first layer with a magnitude above `magnitude` that is at least `ratio` x the "
            "median magnitude of its block output.",
            "Sun et al. 2024, Massive Activations in Large Language Models",
            {"magnitude": 100.0, "ratio": 1000.0},
            _massive,
        ),
        RuleSpec(
            "systematic",
            "Systematic outliers",
            "The first layer where a token's largest magnitude is at least `ratio` x the mean "
            "magnitude of its block output.",
            "An et al. 2025, Systematic Outliers in Large Language Models",
            {"ratio": 1000.0},
            _systematic,
        ),
    )
}


def first_outlier_layer(rule: str, layers: pd.DataFrame, **parameters: float) -> Verdict:
    """Apply a rule to a scan's layer table.

    Args:
        rule: a key of :data:`RULES`.
        layers: columns ``layer`` (0-based; -1 is the embedding output), ``top1``, ``median``,
            ``mean``: magnitudes of the block output.
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
    settings = {**spec.parameters, **parameters}
    broken = layers[layers["nonfinite"] > 0] if "nonfinite" in layers else layers[:0]
    if not broken.empty:
        row = broken.sort_values("layer").iloc[0]
        return Verdict(
            None,
            f"Ill-defined: layer {int(row['layer'])} has {int(row['nonfinite'])} NaN or infinite "
            "activations (overflow in float16?): scan in bfloat16 or float32.",
            settings,
        )
    usable = layers[(layers["median"] > 0) & (layers["mean"] > 0)]
    if usable[usable["layer"] >= 0].empty:
        return Verdict(None, "None found: no layer has finite activations above 0.", settings)
    layer, reason = spec.apply(usable, **settings)
    return Verdict(layer, reason, settings)
