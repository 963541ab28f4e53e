"""Figure of a sensitivity probe: a metric by layer with intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from zo_core.plots.style import ACCENT, GREY, finish

METRICS = {
    "abs_projected_gradient": ("|projected gradient|", "nats per unit of z"),
    "projected_gradient": ("Projected gradient (signed)", "nats per unit of z"),
    "loss_shift": ("Loss shift", "nats"),
    "output_kl": ("Output KL", "nats"),
    "own_output_change": ("Own change", "relative, layer's own output"),
    "final_output_change": ("Final change", "relative, last block's output"),
}
"""Metrics of a probe: title and unit."""

NON_NEGATIVE = (
    "abs_projected_gradient",
    "loss_shift",
    "output_kl",
    "own_output_change",
    "final_output_change",
)
"""Metrics that cannot be below 0: an interval of theirs is cut there."""

# fmt: off
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on
"""0.975 quantiles of Student's t for 1 to 30 degrees of freedom, as in the NIST/SEMATECH
e-Handbook of Statistical Methods, section 1.3.6.7.2; 1.96, the normal quantile, beyond."""


def t_quantile(n: float) -> float:
    """The factor of the standard error in a 95 % interval of a mean of ``n`` draws."""
    return T_975[int(n) - 2] if 2 <= n <= len(T_975) + 1 else 1.96


def intervals(layers: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A metric by layer with its 95 % interval; no width where one draw gives no interval.

    Returns:
        The rows of the metric by layer, with ``low`` and ``high``.
    """
    table = layers[layers["metric"] == metric].sort_values("layer")
    half = table["n"].map(t_quantile) * table["se"].fillna(0.0)
    low = table["mean"] - half
    if metric in NON_NEGATIVE:
        low = low.clip(lower=0.0)
    return table.assign(low=low, high=table["mean"] + half)


def overlapping(layers: pd.DataFrame, layer: int, metric: str) -> list[int] | None:
    """The layers whose interval overlaps that of ``layer``, largest mean first.

    Returns:
        None if there is a layer without an interval (one draw): nothing can be said.
    """
    table = intervals(layers, metric)
    own = table[table["layer"] == layer]
    if own.empty or bool((table["n"] < 2).any()) or bool(table["se"].isna().any()):
        return None
    others = table[(table["layer"] != layer) & (table["high"] >= float(own["low"].iloc[0]))]
    others = others[others["low"] <= float(own["high"].iloc[0])]
    return others.sort_values("mean", ascending=False)["layer"].astype(int).tolist()


def sensitivity(
    layers: pd.DataFrame,
    metric: str,
    first: int | None = None,
    expected: Sequence[int] | None = None,
) -> go.Figure:
    """Mean of a probe metric by layer with 95 % intervals (:func:`intervals`).

    Args:
        layers: ``results/layers.parquet`` of a probe.
        metric: a key of :data:`METRICS`.
        first: the first outlier layer of a scan of the same model, in the accent colour.
        expected: all layers of the probe, so that the axis stays while bars come in.
    """
    title, unit = METRICS.get(metric, (metric, ""))
    table = intervals(layers, metric)
    marked = table["layer"] == first
    figure = go.Figure(
        go.Bar(
            x=table["layer"],
            y=table["mean"],
            width=0.8,  # of a layer, also where the layers are far apart
            marker={
                "color": np.where(marked, ACCENT, "#56B4E9").tolist(),
                "pattern": {"shape": np.where(marked, "/", "").tolist()},
            },
            error_y={
                "type": "data",
                "symmetric": False,
                "array": table["high"] - table["mean"],
                "arrayminus": table["mean"] - table["low"],
                "color": GREY,
                "thickness": 1.5,
                "width": 4,
            },
            customdata=table[["low", "high", "n"]].to_numpy(),
            hovertemplate="layer %{x}: %{y:.4g}<br>95 % interval %{customdata[0]:.4g} to "
            "%{customdata[1]:.4g}, %{customdata[2]} draws<extra></extra>",
            showlegend=False,
        )
    )
    if first is not None and bool(marked.any()):
        figure.add_annotation(
            x=first,
            y=float(table["high"][marked].max()),
            yanchor="bottom",
            yshift=4,
            text="first outlier layer",
            showarrow=False,
            font={"color": ACCENT, "size": 13},
        )
    ticks = sorted(expected if expected is not None else table["layer"].astype(int))
    figure.update_xaxes(
        range=[ticks[0] - 0.6, ticks[-1] + 0.6],
        title="layer (0-based)",
        tickvals=ticks if len(ticks) <= 40 else ticks[::5],
        showgrid=False,
    )
    figure.update_yaxes(title=f"{title}, {unit}", rangemode="tozero")
    return finish(figure, 400)
