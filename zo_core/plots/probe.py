"""Figure of a sensitivity probe: a metric by layer with intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from zo_core.plots.style import ACCENT, GREY, finish

METRICS = {
    "abs_projected_gradient": ("|projected gradient|", "loss units per unit of z"),
    "projected_gradient": ("Projected gradient (signed)", "loss units per unit of z"),
    "loss_shift": ("Loss shift", "nats"),
    "output_kl": ("Output KL", "nats"),
}
"""Metrics of a probe: title and unit."""


def sensitivity(
    layers: pd.DataFrame,
    metric: str,
    first: int | None = None,
    expected: Sequence[int] | None = None,
) -> go.Figure:
    """Mean of a probe metric by layer with 95 % intervals (mean +/- 1.96 se).

    Args:
        layers: ``results/layers.parquet`` of a probe.
        metric: a key of :data:`METRICS`.
        first: the first outlier layer of a scan of the same model, in the accent colour.
        expected: all layers of the probe, so that the axis stays while bars come in.
    """
    title, unit = METRICS.get(metric, (metric, ""))
    table = layers[layers["metric"] == metric].sort_values("layer")
    half = 1.96 * table["se"].fillna(0.0)
    marked = table["layer"] == first
    figure = go.Figure(
        go.Bar(
            x=table["layer"],
            y=table["mean"],
            marker={
                "color": np.where(marked, ACCENT, "#56B4E9").tolist(),
                "pattern": {"shape": np.where(marked, "/", "").tolist()},
            },
            error_y={"type": "data", "array": half, "color": GREY, "thickness": 1.5, "width": 4},
            customdata=np.stack([table["mean"] - half, table["mean"] + half, table["n"]], axis=-1),
            hovertemplate="layer %{x}: %{y:.4g}<br>95 % interval %{customdata[0]:.4g} to "
            "%{customdata[1]:.4g}, %{customdata[2]} draws<extra></extra>",
            showlegend=False,
        )
    )
    if first is not None and bool(marked.any()):
        figure.add_annotation(
            x=first,
            y=float((table["mean"] + half)[marked].max()),
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
