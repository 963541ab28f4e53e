"""The report of a sensitivity probe: every metric and every further analysis that it holds."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from zo_core import plots
from zo_core.errors import UserError
from zo_core.export import Section
from zo_core.jobs import ProbeJob
from zo_core.plots.probe import intervals
from zo_core.reports.stored import about_run, first_outlier_layer, origin, read_tables
from zo_core.runs import Run

SCALINGS = {
    "none": "one eps for all",
    "count": "same norm",
    "rms": "same share of weights",
    "output": "same own change",
}
"""Perturbations of a probe, as people read them."""
WHISKERS = (
    "Bars: mean over draws; whiskers: 95 % interval of that mean (Student t with draws − 1 degrees "
    "of freedom), cut at 0 where the metric cannot be negative; none with one draw."
)
AGREEMENT = (
    "Sign agreement: share of pairs of batches in which g has the same sign for the same z; 50 % "
    "is chance. SNR: what the batches agree on over what they differ by."
)
PROPAGATION = (
    "Relative change of a block's output, |change| / |output| by token, mean over tokens, draws "
    "and signs. Amplification: that over the change at the perturbed layer's own output."
)
EPS = (
    "How far the projected gradients of the same draws are from those at the steadiest eps. Too "
    "large an eps sees curvature, too small a one rounding. The linear range is within 10 %; its "
    "largest eps is recommended."
)
TABLES = ("draws", "layers", "propagation", "gradients", "scaled_layers", "ablation", "sweep")
MEASURED = ("base_loss", "forward_passes", "seconds")
MAIN = "abs_projected_gradient"


def probe_sections(run: Run, job: ProbeJob) -> list[Section]:
    """Everything that a probe measured; the first paragraph is the most sensitive layer.

    Args:
        run: a probe.
        job: its spec.

    Raises:
        UserError: it has not ended, or has no tables that can be read.
    """
    if run.status().live:
        raise UserError(f"run: {run.run_id} is {run.status().state}: wait until it has ended.")
    found = read_tables(run, (*TABLES, "linear_range"))
    layers = found["layers"]
    if layers is None:
        raise UserError(f"run: {run.run_id} ended before its first layer: run it again.")
    summary = run.result_json() or {}
    first = first_outlier_layer(job.model, job.revision)
    expected = job.layers or range(summary.get("n_layers") or int(layers["layer"].max()) + 1)
    most = _most(layers, MAIN)
    return [
        Section(
            "",
            [
                *_headline(layers, most, first),
                f"{about_run(run)} Layers are 0-based. Intervals are of 95 %.",
            ],
        ),
        Section(
            "Sensitivity by layer",
            [
                *(
                    plots.sensitivity(layers, metric, first, expected)
                    for metric in plots.METRICS
                    if (layers["metric"] == metric).any()
                ),
                WHISKERS,
                _by_layer(layers),
            ],
        ),
        *_fair(found["scaled_layers"], first, expected),
        *_distribution(found, first),
        *_propagation(found["propagation"], first),
        *_place(found["ablation"], first, summary),
        *_range(found["sweep"], found["linear_range"], most, summary),
        *origin(run, MEASURED),
    ]


def overlaps(layers: pd.DataFrame, most: int) -> str:
    """How sure it is that a layer has the largest mean |g|."""
    close = plots.overlapping(layers, most, MAIN)
    if close is None:
        return "One draw a layer gives no interval: use more draws to tell layers apart."
    if not close:
        return "Its 95 % interval overlaps with that of no other probed layer."
    shown = ", ".join(str(k) for k in close[:5])
    more = f" and {len(close) - 5} more" if len(close) > 5 else ""
    return (
        f"Its 95 % interval overlaps with layer{'s' if len(close) > 1 else ''} {shown}{more}: more "
        "draws may change the order."
    )


def place(table: pd.DataFrame, target: float | None) -> str:
    """What equalising the layers' own change leaves of a lead.

    Args:
        table: ``results/ablation.parquet``.
        target: the own change that every layer was given.
    """
    if table[["plain_relative", "equalised_relative"]].isna().all().any():
        return "No loss shift is finite and above 0: there is no lead to speak of."
    lead = table.loc[table["plain_relative"].idxmax()]
    after = table.loc[table["equalised_relative"].idxmax()]
    return (
        f"With one eps, layer {lead['layer']:.0f} moves the loss most, "
        f"{lead['plain_relative']:.2g} times as much as the median layer; with every layer's own "
        f"output changed alike{f' (by {target:.3g})' if target else ''} that layer has "
        f"{lead['equalised_relative']:.2g} times, and layer {after['layer']:.0f} leads with "
        f"{after['equalised_relative']:.2g} times."
    )


def about_place(rho: float | None) -> str:
    """How to read that, with Spearman's rho of layer and equalised loss shift."""
    note = (
        "Where the lines differ, a layer is felt because its own output reacts; what stays of a "
        "lead after equalising is due to its place: the way from its output to the loss."
    )
    if rho is None:
        return note
    return (
        f"{note} Rank correlation of layer and equalised loss shift: {rho:+.2f} (−1: each earlier "
        "layer is felt more)."
    )


def recommended(summary: dict[str, Any]) -> str:
    """The eps that suits every probed layer, or why there is none; empty without a sweep."""
    eps, reason = (summary.get(f"recommended_eps{end}") for end in ("", "_reason"))
    if eps is not None:
        return f"Recommended eps: {eps:g}, {reason}."
    return f"No eps can be recommended for all layers: {reason}." if reason else ""


def _most(layers: pd.DataFrame, metric: str) -> int | None:
    """The layer with the largest mean; None where nothing is finite."""
    means = layers[layers["metric"] == metric].dropna(subset="mean").set_index("layer")["mean"]
    return None if means.empty else int(means.idxmax())


def _headline(layers: pd.DataFrame, most: int | None, first: int | None) -> list[str]:
    if most is None:
        return ["No projected gradient is finite."]
    probed = layers["layer"].nunique()
    said = [
        f"Layer {most} is the only layer that was measured."
        if probed == 1
        else f"Layer {most} has the largest mean |g| of the {probed} probed layers. "
        + overlaps(layers, most)
    ]
    if first is not None:
        said.append(
            f"The newest finished scan of this model names layer {first} as the first outlier "
            "layer (emergence rule)."
        )
    return said


def _by_layer(layers: pd.DataFrame) -> pd.DataFrame:
    """|g| with its interval, and the mean of every other metric."""
    main = intervals(layers, MAIN).set_index("layer")[["n", "mean", "low", "high"]]
    means = layers.pivot(index="layer", columns="metric", values="mean")
    others = [metric for metric in plots.METRICS if metric in means and metric != MAIN]
    return main.rename(columns={"mean": MAIN}).join(means[others]).reset_index()


def _fair(scaled: pd.DataFrame | None, first: int | None, expected: Any) -> list[Section]:
    if scaled is None:
        return []
    items: list[Any] = []
    for name in (s for s in SCALINGS if (scaled["scaling"] == s).any()):
        table = scaled[scaled["scaling"] == name]
        items += [
            f"eps scaled for the {SCALINGS[name]}",
            plots.sensitivity(table, "loss_shift", first, expected),
        ]
    return [Section("Loss shift with fair perturbations", items)]


def _distribution(found: dict[str, pd.DataFrame | None], first: int | None) -> list[Section]:
    draws, layers, gradients = found["draws"], found["layers"], found["gradients"]
    if draws is None or layers is None:
        return []
    items: list[Any] = [plots.distribution(draws, layers, first)]
    if gradients is not None and gradients["batches"].max() > 1:
        items += [gradients, AGREEMENT]
    return [Section("Distribution of projected gradients", items)]


def _propagation(table: pd.DataFrame | None, first: int | None) -> list[Section]:
    if table is None:
        return []
    figures: list[str | go.Figure] = [
        plots.propagation(table, quantity, first) for quantity in plots.QUANTITIES
    ]
    return [Section("Propagation", [*figures, PROPAGATION])]


def _place(table: pd.DataFrame | None, first: int | None, summary: dict[str, Any]) -> list[Section]:
    if table is None:
        return []
    items = [
        place(table, summary.get("equalised_own_change")),
        plots.ablation(table, first),
        about_place(summary.get("place_effect")),
    ]
    return [Section("Place or sensitivity?", items)]


def _range(
    sweep: pd.DataFrame | None,
    ranges: pd.DataFrame | None,
    most: int | None,
    summary: dict[str, Any],
) -> list[Section]:
    if sweep is None or ranges is None:
        return []
    layer = int(sweep["layer"].iloc[0]) if most is None else most
    said = recommended(summary)
    figure = plots.eps_sweep(sweep, ranges, layer)
    return [Section("Range of eps", [*([said] if said else []), figure, EPS, ranges])]
