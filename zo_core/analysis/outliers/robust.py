"""Robust z-score: the layer whose jump stands out among the jumps of all layers."""

import numpy as np
import pandas as pd

from zo_core.analysis.outliers.rule import RuleSpec, ScanTables, Verdict, found, none


def modified_z(values: pd.Series) -> pd.Series:
    """Modified z-scores: 0.6745 (x - median) / MAD.

    Where more than half of the values are equal, so that the median absolute deviation is 0, its
    place is taken by 1.2533 x the mean absolute deviation. Source: Iglewicz and Hoaglin 1993, How
    to Detect and Handle Outliers.
    """
    deviation = values - values.median()
    spread = float(deviation.abs().median()) / 0.6745
    if spread == 0:
        spread = 1.2533 * float(deviation.abs().mean())
    return deviation / spread if spread > 0 else deviation * 0.0


def _zscore(tables: ScanTables, z: float, jump: float) -> Verdict:
    layers = tables.layers
    usable = layers[(layers["median"] > 0) & (layers["top1"] > 0)]
    table = usable.set_index("layer").sort_index()
    logs = np.log(table["top1"] / table["median"])
    # A jump needs the layer before it: not one that was left out as NaN.
    follows = pd.Series(logs.index, logs.index).diff() == 1
    jumps = logs.diff()[follows]
    if len(jumps) < 3:
        return none(f"{len(jumps)} jumps between layers are too few for a z-score: it needs 3.")
    scores, times = modified_z(jumps), np.exp(jumps)
    layer = int(jumps.idxmax())
    what = (
        f"top-1 / median is {times[layer]:.2g} x that of the layer before, the largest jump; its "
        f"modified z-score among all {len(jumps)} jumps is {scores[layer]:.1f}"
    )
    numbers = {
        "top1": float(table["top1"][layer]),
        "jump": float(times[layer]),
        "z": float(scores[layer]),
    }
    if scores[layer] >= z and times[layer] >= jump:
        return found(layer, f"{what}.", **numbers)
    return none(f"layer {layer}: {what}; the rule asks for {jump:g} x and {z:g}.", **numbers)


ZSCORE = RuleSpec(
    "zscore",
    "Robust z-score",
    "activation",
    "The layer of the largest jump, ln(top-1 / median) less that of the layer before (layer 0: of "
    "the embedding output), if its modified z-score among the jumps of all layers is at least `z` "
    "and it is at least a factor of `jump`.",
    "Iglewicz and Hoaglin 1993 (score and cut-off), applied to layers by ZOScope",
    {"z": 3.5, "jump": 2.0},
    _zscore,
)
