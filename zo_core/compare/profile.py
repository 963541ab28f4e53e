"""The measured gain of every single layer, and whether a profile of the model foretells it."""

from collections import defaultdict

import pandas as pd

from zo_core.compare.results import Results
from zo_core.compare.stats import bootstrap_interval, rank_correlation, summarise
from zo_core.scope_spec import parse

COLUMNS = ["layer", "n", "mean", "sd", "low", "high"]


def layer_gains(results: Results) -> pd.DataFrame:
    """One row a layer that was tuned alone with zo-sgd: its gain over zero-shot, over units.

    ``layer:auto`` and random layers count as the layer they turned out to be; a layer that two arms
    tuned has a unit of each. ``low`` and ``high`` are the 95 % bootstrap interval of the mean.
    """
    plain = {a.name for a in results.spec.arms if a.optimizer == "zo-sgd" and not a.settings}
    found: dict[int, list[float]] = defaultdict(list)
    for m in results.measurements:
        if m.arm not in plain or m.value is None or m.before is None or m.layer is None:
            continue
        if parse(m.resolved_scope).form in ("layer", "random-layer"):
            found[m.layer].append(m.value - m.before)
    rows = []
    for layer, gains in sorted(found.items()):
        summary = summarise(gains)
        low, high = bootstrap_interval(gains) or (None, None)
        rows.append((layer, summary.n, summary.mean, summary.sd, low, high))
    return pd.DataFrame(rows, columns=COLUMNS)


def rank_correlations(
    gains: pd.DataFrame, scan: pd.DataFrame | None, probe: pd.DataFrame | None
) -> pd.DataFrame:
    """Spearman's rho between the gains and what inference alone says of the layers.

    Args:
        gains: of :func:`layer_gains`.
        scan: ``layers.parquet`` of a scan (top-1 over median is compared), if there is one.
        probe: ``layers.csv`` of a probe (mean |g| is compared), if there is one.

    Returns:
        A row a pair of profiles: ``a, b, rho, p, n``; rho and p are None with fewer than four
        layers, or where one of the two does not vary.
    """
    profiles = {"gain": dict(zip(gains["layer"], gains["mean"], strict=True))}
    if scan is not None:
        blocks = scan[scan["layer"] >= 0]
        ratio = blocks["top1"] / blocks["median"]
        profiles["outlier"] = dict(zip(blocks["layer"], ratio, strict=True))
    if probe is not None:
        felt = probe[probe["metric"] == "abs_projected_gradient"]
        profiles["sensitivity"] = dict(zip(felt["layer"], felt["mean"], strict=True))
    names = list(profiles)
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            layers = sorted(profiles[a].keys() & profiles[b].keys())
            found = rank_correlation(
                [profiles[a][k] for k in layers], [profiles[b][k] for k in layers]
            )
            rows.append((a, b, *(found or (None, None)), len(layers)))
    return pd.DataFrame(rows, columns=["a", "b", "rho", "p", "n"])
