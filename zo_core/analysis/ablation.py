"""Is an early layer felt more for its place, or because its own output reacts more? No torch.

Two probes of the same layers and draws: with one eps for all (plain), and with eps scaled so that
every layer's own output changes by the same share (equalised). What equalising takes away from a
layer's lead was its own reaction; what stays is the way from its output to the loss: its place.
"""

import math

import pandas as pd

METRIC = "loss_shift"


def ablation(draws: pd.DataFrame, scalings: pd.DataFrame) -> pd.DataFrame:
    """What reaches the loss from every layer, plain and equalised.

    Args:
        draws: ``layer, draw, metric, value`` of the plain probe.
        scalings: ``layer, scaling, factor, draw, metric, value``.

    Returns:
        ``layer, plain, equalised`` (mean loss shift, nats), ``plain_relative`` and
        ``equalised_relative`` (over the median layer's), ``plain_own_change`` and
        ``equalised_own_change`` (mean relative change of the layer's own output), ``factor``
        (mean over draws of what eps was multiplied with).
    """
    equalised = scalings[scalings["scaling"] == "output"]
    table = pd.DataFrame(
        {
            "plain": _mean(draws, METRIC),
            "equalised": _mean(equalised, METRIC),
            "plain_own_change": _mean(draws, "own_output_change"),
            "equalised_own_change": _mean(equalised, "own_output_change"),
            "factor": equalised.groupby("layer")["factor"].mean(),
        }
    ).dropna()
    for name in ("plain", "equalised"):
        table[f"{name}_relative"] = table[name] / table[name].median()
    order = ["plain", "equalised", "plain_relative", "equalised_relative"]
    order += ["plain_own_change", "equalised_own_change", "factor"]
    return table[order].rename_axis("layer").reset_index()


def place_effect(table: pd.DataFrame) -> float | None:
    """Spearman's rho of layer and equalised loss shift: -1 if each earlier layer is felt more.

    None with fewer than four layers, or where the loss shift does not vary.
    """
    if len(table) < 4:
        return None
    rho = float(table["layer"].rank().corr(table["equalised"].rank()))
    return None if math.isnan(rho) else rho


def _mean(table: pd.DataFrame, metric: str) -> pd.Series:
    return table[table["metric"] == metric].groupby("layer")["value"].mean()
