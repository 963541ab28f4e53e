"""Emergence: the first layer that is prominent, far above every earlier one, and stays.

With r(k) = top-1(k) / median(k) of the block output, and r(-1) that of the embedding output. Why
these three conditions: docs/outliers.md.
"""

import pandas as pd

from zo_core.analysis.outliers.rule import (
    RuleSpec,
    ScanTables,
    Verdict,
    found,
    ill_defined,
    none,
    short,
)


def _emergence(tables: ScanTables, jump: float, ratio: float, persist: float) -> Verdict:
    layers = tables.layers
    usable = layers[(layers["median"] > 0) & (layers["mean"] > 0)]
    table = usable.set_index("layer").sort_index()
    r, top1 = table["top1"] / table["median"], table["top1"]
    blocks = [int(k) for k in table.index if k >= 0]
    prominent = [k for k in blocks if r[k] >= ratio]
    if not prominent:
        best = max(blocks, key=lambda k: r[k])
        return none(
            f"top-1 is at most {short(r[best])} x the median (layer {best}); the rule asks for "
            f"{ratio:g} x.",
            top1=top1[best],
            times_median=r[best],
        )
    jumped = []
    for k in prominent:
        before = r[r.index < k].max() if (r.index < k).any() else 0.0
        if r[k] < jump * before:
            continue
        jumped.append(k)
        if _stays(top1, k, int(persist)):
            return found(
                k,
                f"top-1 is {short(top1[k])}, {short(r[k])} x the median of layer {k}; every "
                f"earlier layer is at most {short(before)} x, and it stays for the next "
                f"{int(persist)} layers.",
                top1=top1[k],
                times_median=r[k],
                times_median_before=before,
            )
    first = prominent[0]
    passes = f"top-1 passes {ratio:g} x the median at layer {first}, "
    if jumped:
        k = jumped[0]
        return ill_defined(
            f"{passes}but what jumps at layer {k} does not last: of {short(top1[k])} less than "
            f"half is left within the next {int(persist)} layers, or they do not exist.",
            top1=top1[k],
            times_median=r[k],
        )
    steps = {k: r[k] / r[r.index < k].max() for k in prominent if (r.index < k).any()}
    largest = max(steps, key=lambda k: steps[k])
    return ill_defined(
        f"{passes}but it grows gradually: the largest step above all earlier layers is "
        f"{steps[largest]:.2g} x, at layer {largest}; the rule asks for {jump:g} x.",
        top1=top1[largest],
        times_median=r[largest],
        largest_step=steps[largest],
    )


def _stays(top1: pd.Series, layer: int, persist: int) -> bool:
    """Whether top-1 keeps half of a layer's value in each of the next layers, which must exist."""
    following = [k for k in top1.index if layer < k <= layer + persist]
    return len(following) == persist and all(top1[k] >= top1[layer] / 2 for k in following)


EMERGENCE = RuleSpec(
    "emergence",
    "Emergence",
    "activation",
    "The first layer whose top-1 is at least `ratio` x the median magnitude of its block output, "
    "whose top-1 / median is at least `jump` x that of every earlier layer (the embedding output "
    "included), and whose top-1 does not fall below half in the next `persist` layers.",
    "ZOScope (docs/outliers.md)",
    {"jump": 2.0, "ratio": 100.0, "persist": 3.0},
    _emergence,
)
