"""The measured gain of every single layer, and whether a profile of the model foretells it."""

from collections import defaultdict

import pandas as pd

from zo_core import runs
from zo_core.compare.reader import ACTIVATION, ALL, SENSITIVITY
from zo_core.compare.results import Results
from zo_core.compare.stats import bootstrap_interval, rank_correlation, summarise
from zo_core.scope_spec import parse

GAINS = ["task", "layer", "n", "mean", "sd", "low", "high"]
FELT = "abs_projected_gradient"
"""The metric of a probe that gains are held against."""


def layer_gains(results: Results) -> pd.DataFrame:
    """One row a task and layer that was tuned alone with zo-sgd: its gain over zero-shot.

    With several tasks there are rows over all of them, too. ``layer:auto`` and random layers count
    as the layer they turned out to be; a layer that two arms tuned has a unit of each. ``low`` and
    ``high`` are the 95 % bootstrap interval of the mean.
    """
    plain = {a.name for a in results.spec.arms if a.optimizer == "zo-sgd" and not a.settings}
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for m in results.measurements:
        if m.arm not in plain or m.value is None or m.before is None or m.layer is None:
            continue
        if parse(m.resolved_scope).form in ("layer", "random-layer"):
            for task in {m.task, results.tasks[-1] or ALL}:
                found[task, m.layer].append(m.value - m.before)
    rows = []
    for (task, layer), gains in sorted(found.items()):
        summary = summarise(gains)
        low, high = bootstrap_interval(gains) or (None, None)
        rows.append((task, layer, summary.n, summary.mean, summary.sd, low, high))
    return pd.DataFrame(rows, columns=GAINS)


def activation_profile(results: Results) -> pd.DataFrame:
    """``layer, top1, median`` of the comparison's scan; no rows while there is none."""
    try:
        layers = pd.read_parquet(runs.get(results.scan).result("layers.parquet"))
    except (OSError, ValueError, runs.RunNotFoundError):
        return pd.DataFrame(columns=ACTIVATION)
    return layers.loc[layers["layer"] >= 0, ACTIVATION].sort_values("layer")


def sensitivity_profile(results: Results) -> pd.DataFrame:
    """``task, layer, metric, mean, sd, se, n`` of the comparison's probes: mean |g| by layer."""
    found = []
    for task, run_id in results.probes.items():
        try:
            layers = pd.read_parquet(runs.get(run_id).result("layers.parquet"))
        except (OSError, ValueError, runs.RunNotFoundError):
            continue
        found.append(layers[layers["metric"] == FELT].assign(task=task)[SENSITIVITY])
    return pd.concat(found) if found else pd.DataFrame(columns=SENSITIVITY)


def correlations(
    gains: pd.DataFrame, activation: pd.DataFrame, sensitivity: pd.DataFrame
) -> pd.DataFrame:
    """:func:`rank_correlations` on every task; over all tasks with the mean sensitivity of them."""
    found = []
    for task in dict.fromkeys(gains["task"]):
        felt = sensitivity[sensitivity["task"] == task]
        if task == ALL:
            felt = sensitivity.groupby("layer", as_index=False)["mean"].mean()
        table = rank_correlations(gains[gains["task"] == task], activation, felt)
        found.append(table.assign(task=task))
    columns = ["task", "a", "b", "rho", "p", "n"]
    return pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)


def rank_correlations(
    gains: pd.DataFrame, activation: pd.DataFrame, sensitivity: pd.DataFrame
) -> pd.DataFrame:
    """Spearman's rho between the gains and what inference alone says of the layers.

    Args:
        gains: ``layer, mean``.
        activation: ``layer, top1, median``: top-1 over median is compared, what outlier rules ask.
        sensitivity: ``layer, mean``: mean |g| of a probe.

    Returns:
        A row a pair of profiles that are there: ``a, b, rho, p, n``; rho and p are None with fewer
        than four layers, or where one of the two does not vary.
    """
    profiles = {
        "gain": dict(zip(gains["layer"], gains["mean"], strict=True)),
        "outlier": dict(
            zip(activation["layer"], activation["top1"] / activation["median"], strict=True)
        ),
        "sensitivity": dict(zip(sensitivity["layer"], sensitivity["mean"], strict=True)),
    }
    names = [name for name, profile in profiles.items() if profile]
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            layers = sorted(profiles[a].keys() & profiles[b].keys())
            found = rank_correlation(
                [profiles[a][k] for k in layers], [profiles[b][k] for k in layers]
            )
            rows.append((a, b, *(found or (None, None)), len(layers)))
    return pd.DataFrame(rows, columns=["a", "b", "rho", "p", "n"])
