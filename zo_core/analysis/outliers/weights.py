"""Rules that need weights: outliers of the down-projection, and the layer weighting of OWL."""

import numpy as np
import pandas as pd

from zo_core.analysis.outliers.rule import RuleSpec, ScanTables, Verdict, found, none

OWL_M = tuple(float(m) for m in range(3, 14))


def outlying_columns(weights: pd.DataFrame) -> pd.DataFrame:
    """The down-projection of each layer (of a mixture: of each expert) with the largest column.

    Returns:
        Rows of ``weights`` with ``ratio``, largest / mean magnitude of the column where that is
        largest, over that of the median column; indexed by layer.
    """
    table = weights.assign(ratio=weights["column_peak"] / weights["column_peak_median"])
    table = table[np.isfinite(table["ratio"])]
    best = table.groupby("layer")["ratio"].idxmax()
    return table.loc[best].set_index("layer").sort_index()


def _down_weights(tables: ScanTables, ratio: float) -> Verdict:
    assert tables.weights is not None
    table = outlying_columns(tables.weights)
    if table.empty:
        return none("the model has no down-projection that can be read.")
    hit = table["ratio"] >= ratio
    layer = int(hit.idxmax() if hit.any() else table["ratio"].idxmax())
    row = table.loc[layer]
    peak, column, channel = row["column_peak"], row["column_peak_column"], row["column_peak_row"]
    numbers = {
        "ratio": float(row["ratio"]),
        "largest_to_mean": float(peak),
        "input_neuron": float(column),
        "output_channel": float(channel),
    }
    what = (
        f"the weights of input neuron {column:.0f} peak at output channel {channel:.0f} with "
        f"{peak:.0f} x their mean, {row['ratio']:.1f} x the median neuron's"
    )
    if hit.any():
        return found(layer, f"In layer {layer} {what}; no earlier layer meets the rule.", **numbers)
    return none(f"layer {layer} comes closest: {what}; the rule asks for {ratio:g} x.", **numbers)


def owl_weights(owl: pd.DataFrame, m: float) -> pd.DataFrame:
    """The share of outlying Wanda scores by layer, and OwLore's probability to sample the layer.

    Returns:
        ``share`` and ``probability`` (shares that add up to 1), indexed by layer.
    """
    share = owl[owl["m"] == m].set_index("layer")["share"].sort_index()
    total = share.sum()
    return pd.DataFrame({"share": share, "probability": share / total if total else share})


def _owl(tables: ScanTables, m: float) -> Verdict:
    assert tables.owl is not None
    table = owl_weights(tables.owl, m)
    if table.empty or not table["share"].max() > 0:
        return none(f"no layer has a Wanda score above {m:g} x its mean.")
    layer = int(table["share"].idxmax())
    share, probability = table.loc[layer, "share"], table.loc[layer, "probability"]
    return found(
        layer,
        f"{share:.2%} of its Wanda scores are above {m:g} x their mean, the largest share "
        f"(median layer: {table['share'].median():.2%}). A weighting of layers: it always has a "
        "largest.",
        share=float(share),
        probability=float(probability),
    )


DOWN_WEIGHTS = RuleSpec(
    "down_weights",
    "Down-projection weights",
    "weight",
    "Weights only: the first layer whose down-projection has a column (the weights of one input "
    "neuron) with a largest / mean magnitude of at least `ratio` x that of its median column.",
    "An et al. 2025 (arXiv 2502.06415) for largest / mean by column; they plot it and state no "
    "threshold: `ratio` is ours",
    {"ratio": 10.0},
    _down_weights,
    needs="weights",
)
OWL = RuleSpec(
    "owl",
    "OWL / OwLore",
    "weighting",
    "The layer with the largest share of Wanda scores (weight magnitude x L2 norm of the input "
    "channel) above `m` x their mean over the linear layers of the block.",
    "Yin et al. 2024, OWL (arXiv 2310.05175); Li et al. 2024, OwLore (arXiv 2405.18380)",
    {"m": 5.0},
    _owl,
    needs="owl",
    choices={"m": OWL_M},
)
