"""The range of eps in which a projected gradient does not depend on eps. No torch.

Too large an eps sees the curvature of the loss (an error of order eps squared), too small a one the
rounding of losses and weights (an error of order 1 / eps). Between them g is constant: the linear
range. All values of eps share their draws of z, so g is compared draw by draw.

For a layer, with ``g(eps)`` the vector of its projected gradients over draws:

1. The *anchor* is the smaller eps of the two neighbours whose g differ least,
   ``|g(a) - g(b)| / max(|g(a)|, |g(b)|)``.
2. The **linear range** is the longest run of consecutive eps around the anchor with a *deviation*
   ``|g(eps) - g(anchor)| / |g(anchor)|`` of at most ``tolerance`` (10 %). If no neighbour of the
   anchor belongs to it, there is none.
3. The **recommended eps** of the layer is the largest of its range: rounding weighs least there.
   That of the model is the largest eps in the range of every probed layer.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

TOLERANCE = 0.1
FEWEST = 3
"""Values of eps below which no range can be told."""


def deviations(sweep: pd.DataFrame) -> pd.DataFrame:
    """How far the projected gradients at each eps are from those at the anchor.

    Args:
        sweep: ``layer, eps, draw, projected_gradient``.

    Returns:
        ``layer, eps, deviation, anchor``; the deviation is NaN where g vanishes at the anchor.
    """
    rows = []
    for layer, table in sweep.groupby("layer"):
        g = table.pivot(index="eps", columns="draw", values="projected_gradient").sort_index()
        values = g.to_numpy()
        anchor = _anchor(values)
        norm = np.linalg.norm(values[anchor])
        apart = np.linalg.norm(values - values[anchor], axis=1)
        deviation = apart / norm if norm else np.full(len(g), np.nan)
        rows += [
            (layer, float(eps), float(d), i == anchor)
            for i, (eps, d) in enumerate(zip(g.index, deviation, strict=True))
        ]
    return pd.DataFrame(rows, columns=["layer", "eps", "deviation", "anchor"])


def _anchor(values: np.ndarray) -> int:
    """The smaller eps of the two neighbours whose g [eps, draws] differ least."""
    norms = np.linalg.norm(values, axis=1)
    steps = np.linalg.norm(np.diff(values, axis=0), axis=1)
    larger = np.maximum(norms[1:], norms[:-1])
    relative = np.divide(steps, larger, out=np.full(len(steps), np.inf), where=larger > 0)
    return int(np.argmin(np.nan_to_num(relative, nan=np.inf)))


def linear_ranges(sweep: pd.DataFrame, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """The linear range and the recommended eps of every layer; see the top of this file.

    Returns:
        ``layer, lowest, highest, recommended, reason``; NaN where there is no range.
    """
    rows: list[tuple[int, float, float, float, str]] = []
    for layer, table in deviations(sweep).groupby("layer"):
        inside = (table["deviation"] <= tolerance).tolist()
        anchor = table["anchor"].tolist().index(True)
        low = high = anchor
        while low > 0 and inside[low - 1]:
            low -= 1
        while high + 1 < len(inside) and inside[high + 1]:
            high += 1
        eps = table["eps"].tolist()
        if low == high:
            reason = f"no two neighbouring eps agree within {tolerance:.0%}"
            rows.append((int(layer), math.nan, math.nan, math.nan, reason))
            continue
        reason = f"g within {tolerance:.0%} of its value at {eps[anchor]:g}"
        if high + 1 == len(eps):
            reason += "; the range may go on above the largest eps"
        rows.append((int(layer), eps[low], eps[high], eps[high], reason))
    return pd.DataFrame(rows, columns=["layer", "lowest", "highest", "recommended", "reason"])


def recommended_eps(ranges: pd.DataFrame) -> tuple[float | None, str]:
    """The largest eps in the linear range of every layer, or None, and why."""
    if ranges["lowest"].isna().any():
        without = ranges.loc[ranges["lowest"].isna(), "layer"].astype(int).tolist()
        shown = ", ".join(map(str, without[:5])) + (" and others" if len(without) > 5 else "")
        return None, f"layer {shown} has no linear range: sweep other eps or more draws"
    low, high = ranges["lowest"].max(), ranges["highest"].min()
    if low > high:
        return None, "no eps lies in the linear range of every layer: choose eps by layer"
    return float(high), f"the largest eps in the linear range of all {len(ranges)} probed layers"


def as_facts(sweep: pd.DataFrame) -> Mapping[str, object]:
    """What a summary says of a sweep."""
    eps, reason = recommended_eps(linear_ranges(sweep))
    return {"recommended_eps": eps, "recommended_eps_reason": reason}
