"""Published rules that compare a layer's largest magnitude with a threshold."""

import pandas as pd

from zo_core.analysis.outliers.rule import (
    RuleSpec,
    ScanTables,
    Verdict,
    blocks_of,
    found,
    none,
    short,
)

AN = "An et al. 2025, Systematic Outliers in Large Language Models (arXiv 2502.06415)"


def _massive(tables: ScanTables, magnitude: float, ratio: float) -> Verdict:
    blocks = blocks_of(tables.layers)
    relative = blocks["top1"] / blocks["median"]
    hit = (blocks["top1"] > magnitude) & (relative >= ratio)
    limit = f"{ratio:g} x and more than {magnitude:g}"
    return _first(blocks, relative, hit, "the median", limit)


def _systematic(tables: ScanTables, ratio: float) -> Verdict:
    blocks = blocks_of(tables.layers)
    relative = blocks["top1"] / blocks["mean"]
    return _first(blocks, relative, relative > ratio, "the mean", f"more than {ratio:g} x")


def _down_input(tables: ScanTables, ratio: float) -> Verdict:
    parts = tables.parts
    assert parts is not None
    blocks = blocks_of(parts[parts["part"] == "down_input"])
    if blocks.empty:
        return none("the scan has no input of a down-projection: the family has none.")
    relative = blocks["top1"] / blocks["mean"]
    return _first(blocks, relative, relative > ratio, "the mean", f"more than {ratio:g} x")


def _first(
    blocks: pd.DataFrame, relative: pd.Series, hit: pd.Series, base: str, limit: str
) -> Verdict:
    """The first layer that meets a rule, or the one that comes closest."""
    index = hit.idxmax() if hit.any() else relative.idxmax()
    layer, top1, times = int(blocks["layer"][index]), blocks["top1"][index], relative[index]
    numbers = {"top1": float(top1), f"times_{base.split()[-1]}": float(times)}
    if not hit.any():
        return none(
            f"layer {layer} comes closest with top-1 {short(top1)}, {short(times)} x {base}; the "
            f"rule asks for {limit}.",
            **numbers,
        )
    return found(
        layer,
        f"top-1 is {short(top1)}, {short(times)} x {base} of layer {layer}; no earlier layer "
        "meets the rule.",
        **numbers,
    )


MASSIVE = RuleSpec(
    "massive",
    "Massive activations",
    "activation",
    "The first layer with a magnitude above `magnitude` that is at least `ratio` x the median "
    "magnitude of its block output.",
    "Sun et al. 2024, Massive Activations in Large Language Models (arXiv 2402.17762)",
    {"magnitude": 100.0, "ratio": 1000.0},
    _massive,
)
SYSTEMATIC = RuleSpec(
    "systematic",
    "Systematic outliers",
    "activation",
    "The first layer where a token's largest magnitude is more than `ratio` x the mean magnitude "
    "of its block output.",
    AN,
    {"ratio": 1000.0},
    _systematic,
)
DOWN_INPUT = RuleSpec(
    "down_input",
    "Systematic outliers, down-projection input",
    "activation",
    "The first layer where a token's largest magnitude at the input of the down-projection is more "
    "than `ratio` x the mean magnitude there.",
    AN,
    {"ratio": 1000.0},
    _down_input,
    needs="parts",
)
