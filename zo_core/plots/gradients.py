"""Figures of projected gradients: their distribution by layer, and their dependence on eps."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from zo_core.analysis.epsilon import TOLERANCE, deviations
from zo_core.plots.probe import intervals
from zo_core.plots.propagation import layer_axis
from zo_core.plots.style import GREY, OKABE_ITO, finish, mark

POINTS = 100
"""Draws of a layer shown as points; the box is of all."""


def distribution(
    draws: pd.DataFrame, layers: pd.DataFrame, first: int | None = None, selected: int | None = None
) -> go.Figure:
    """Projected gradients of every layer: quartiles, draws, mean with its 95 % interval.

    Args:
        draws: ``results/draws.parquet`` of a probe.
        layers: ``results/layers.parquet``.
        first: the first outlier layer, marked.
        selected: a layer chosen by the user, marked.
    """
    table = draws[draws["metric"] == "projected_gradient"].dropna()
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    quartiles = table.groupby("layer")["value"].quantile(shares).unstack()
    quartiles = quartiles.reindex(columns=shares)  # there are none if no draw is finite
    figure = go.Figure(
        go.Box(
            x=quartiles.index,
            lowerfence=quartiles[0.0],
            q1=quartiles[0.25],
            median=quartiles[0.5],
            q3=quartiles[0.75],
            upperfence=quartiles[1.0],
            name="quartiles, range",
            width=0.8,
            line={"color": GREY, "width": 1},
            fillcolor="rgba(138,148,160,0.15)",
            hoverinfo="skip",
        )
    )
    points = table[table["draw"] < POINTS]
    # Beside one another, so that equal values can be told apart.
    offset = ((points["draw"] * 0.618034) % 1 - 0.5) * 0.5
    figure.add_scatter(
        x=points["layer"] + offset,
        y=points["value"],
        mode="markers",
        name="draws of z",
        marker={"color": OKABE_ITO[5], "size": 5, "opacity": 0.8},
        customdata=points[["layer", "draw"]].to_numpy().tolist(),
        hovertemplate="layer %{customdata[0]}, draw %{customdata[1]}: g = %{y:.4g}<extra></extra>",
    )
    mean = intervals(layers, "projected_gradient")
    figure.add_scatter(
        x=mean["layer"],
        y=mean["mean"],
        mode="markers",
        name="mean, 95 % interval",
        marker={"symbol": "diamond", "size": 9, "color": OKABE_ITO[1]},
        error_y={
            "type": "data",
            "array": mean["high"] - mean["mean"],
            "color": OKABE_ITO[1],
            "thickness": 2,
            "width": 5,
        },
        customdata=mean[["layer", "low", "high", "sd"]].to_numpy().tolist(),
        hovertemplate="layer %{x}: mean %{y:.4g}, 95 % interval %{customdata[1]:.4g} to "
        "%{customdata[2]:.4g}, sd %{customdata[3]:.4g}<extra></extra>",
    )
    mark(figure, first, selected)
    layer_axis(figure, sorted(layers["layer"].unique().astype(int).tolist()))
    figure.update_yaxes(title="projected gradient, nats per unit of z", zeroline=True)
    return finish(figure, 400).update_layout(margin_t=64, legend_y=1.1)


def eps_sweep(sweep: pd.DataFrame, ranges: pd.DataFrame, layer: int) -> go.Figure:
    """How far projected gradients are from those in the linear range, over eps.

    Args:
        sweep: ``results/sweep.parquet`` of a probe.
        ranges: ``results/linear_range.parquet``.
        layer: drawn in colour with its range and recommended eps; the others in grey.
    """
    table = deviations(sweep)
    table["shown"] = table["deviation"].clip(upper=1.5)
    figure = go.Figure()
    others = table[table["layer"] != layer]
    if not others.empty:
        # One line with gaps, in place of one trace a layer.
        gap = pd.DataFrame({"layer": others["layer"].unique(), "eps": np.inf})
        joined = pd.concat([others, gap]).sort_values(["layer", "eps"])
        figure.add_scatter(
            x=joined["eps"].replace(np.inf, np.nan),
            y=joined["shown"],
            mode="lines",
            name="other layers",
            line={"color": GREY, "width": 1},
            opacity=0.6,
            connectgaps=False,
            hoverinfo="skip",
        )
    own = table[table["layer"] == layer]
    figure.add_scatter(
        x=own["eps"],
        y=own["shown"],
        mode="lines+markers",
        name=f"layer {layer}",
        line={"color": OKABE_ITO[1], "width": 2.5},
        marker={"size": 8},
        customdata=own[["deviation"]].to_numpy().tolist(),
        hovertemplate="eps %{x:g}: %{customdata[0]:.1%} away<extra></extra>",
    )
    figure.add_hline(
        y=TOLERANCE,
        line={"color": GREY, "width": 1, "dash": "dot"},
        annotation_text=f"{TOLERANCE:.0%}",
        annotation_position="top right",
    )
    found = ranges[(ranges["layer"] == layer) & ranges["lowest"].notna()]
    if not found.empty:
        row = found.iloc[0]
        figure.add_vrect(
            x0=row["lowest"],
            x1=row["highest"],
            fillcolor=OKABE_ITO[2],
            opacity=0.15,
            line_width=0,
        )
        figure.add_vline(
            x=row["recommended"], line={"color": OKABE_ITO[2], "width": 2, "dash": "dash"}
        )
        # Annotations, unlike shapes, count in powers of ten on a log axis.
        figure.add_annotation(
            x=math.log10(row["recommended"]),
            y=1,
            yref="paper",
            yanchor="bottom",
            text=f"layer {layer}: at most {row['recommended']:g}",
            font={"color": OKABE_ITO[2], "size": 13},
            showarrow=False,
        )
        figure.add_annotation(
            x=(math.log10(row["lowest"]) + math.log10(row["highest"])) / 2,
            y=0.97,
            yref="paper",
            yanchor="top",
            text="linear range",
            showarrow=False,
        )
    # The eps that were measured: plotly's own ticks of a log axis run into one another.
    measured = sorted(table["eps"].unique())
    figure.update_xaxes(
        title="eps (log scale)",
        type="log",
        tickvals=measured,
        ticktext=[f"{eps:g}" for eps in measured],
    )
    figure.update_yaxes(
        title="deviation of g", tickformat=".0%", range=[-0.03, min(1.55, _top(table))]
    )
    return finish(figure, 380).update_layout(margin_t=64, legend_y=1.1)


def _top(table: pd.DataFrame) -> float:
    largest = float(table["shown"].max())
    return max(0.3, 1.1 * largest) if largest == largest else 0.3
