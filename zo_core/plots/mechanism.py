"""Figures of the mechanism: who writes and removes, which neurons, sinks, interventions."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from zo_core.plots.propagation import layer_axis, layer_ticks
from zo_core.plots.style import ACCENT, GREY, OKABE_ITO, explain_outline, finish, mark, number

INTERVENTIONS = {
    "zero": ("set to zero", OKABE_ITO[0], "solid", "circle"),
    "mean": ("set to their mean", OKABE_ITO[1], "dash", "square"),
    "control": ("control: ordinary channels set to zero", OKABE_ITO[2], "dot", "x"),
}


def contributions(table: pd.DataFrame, selected: int | None = None) -> go.Figure:
    """The residual stream at a site: its value after every block, and what each part added.

    Args:
        table: rows of one site of ``results/contributions.parquet``.
        selected: a layer chosen by the user, marked.
    """
    figure = go.Figure()
    for part, colour, shape in (("attention", OKABE_ITO[4], "/"), ("mlp", OKABE_ITO[1], "")):
        figure.add_bar(
            x=table["layer"],
            y=table[part],
            name={"mlp": "added by the MLP", "attention": "added by the attention"}[part],
            marker={"color": colour, "pattern": {"shape": shape}},
            customdata=table[["layer"]].to_numpy().tolist(),
            hovertemplate="layer %{x}: %{y:.4g}<extra></extra>",
        )
    figure.add_scatter(
        x=table["layer"],
        y=table["after"],
        mode="lines+markers",
        name="block output",
        line={"color": GREY, "width": 2},
        marker={"size": 6},
        customdata=table[["layer"]].to_numpy().tolist(),
        hovertemplate="after layer %{x}: %{y:.4g}<extra></extra>",
    )
    mark(figure, None, selected)
    layer_axis(figure, table["layer"].astype(int).tolist())
    figure.update_yaxes(title="value in the massive channel", zeroline=True)
    return finish(figure, 400).update_layout(barmode="group", margin_t=64, legend_y=1.1)


def neurons(table: pd.DataFrame, count: int = 12) -> go.Figure:
    """Input neurons of a down-projection by what they write to the massive channel.

    Args:
        table: rows of one site and role of ``results/neurons.parquet``.
        count: bars shown.
    """
    shown = table.head(count).iloc[::-1]
    figure = go.Figure(
        go.Bar(
            x=shown["product"],
            y=[f"neuron {n}" for n in shown["neuron"]],
            orientation="h",
            marker={"color": OKABE_ITO[1]},
            customdata=shown[["activation", "weight", "share"]].to_numpy().tolist(),
            text=[f"{s:.1%}" for s in shown["share"]],
            hovertemplate="%{y}: activation %{customdata[0]:.4g} x weight %{customdata[1]:.4g} = "
            "%{x:.4g}, %{customdata[2]:.1%} of all<extra></extra>",
            showlegend=False,
        )
    )
    figure.update_xaxes(title="written to the channel", zeroline=True)
    figure.update_yaxes(showgrid=False)
    return finish(figure, 100 + 26 * len(shown))


def sinks(table: pd.DataFrame, first: int | None = None, selected: int | None = None) -> go.Figure:
    """Share of attention on the massive tokens, layer x head.

    Args:
        table: ``results/sinks.parquet``.
        first: the first outlier layer, outlined.
        selected: a layer chosen by the user, outlined with dots.
    """
    matrix = table.pivot(index="layer", columns="head", values="share")
    layers, heads = [int(k) for k in matrix.index], [int(h) for h in matrix.columns]
    figure = go.Figure(
        go.Heatmap(
            z=matrix.to_numpy(),
            x=heads,
            y=layers,
            zmin=0,
            zmax=1,
            colorscale="Cividis",
            hoverinfo="skip",
            ygap=1,
            xgap=1,
            colorbar={
                "title": {"text": "share of<br>attention", "side": "top"},
                "tickformat": ".0%",
                "thickness": 12,
                "outlinewidth": 0,
            },
        )
    )
    # Plotly reports no selection for heatmap cells, but does for markers on top of them.
    figure.add_scatter(
        x=table["head"],
        y=table["layer"],
        mode="markers",
        marker={"symbol": "square", "size": 12, "opacity": 0},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
        customdata=table[["layer", "share", "uniform"]].to_numpy().tolist(),
        hovertemplate="layer %{y}, head %{x}: %{customdata[1]:.1%}<br>"
        "evenly spread it would be %{customdata[2]:.1%}<extra></extra>",
        showlegend=False,
    )
    edge = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "fillcolor": "rgba(0,0,0,0)"}
    if selected is not None and selected != first:
        line = {"color": GREY, "width": 2, "dash": "dot"}
        figure.add_shape(**edge, y0=selected - 0.5, y1=selected + 0.5, line=line)
    if first is not None:
        line = {"color": ACCENT, "width": 2.5}
        figure.add_shape(**edge, y0=first - 0.5, y1=first + 0.5, line=line)
        explain_outline(figure, first)
    figure.update_xaxes(
        title="head (0-based)",
        tickvals=layer_ticks(heads),
        range=[-0.5, max(heads) + 0.5],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title="layer (0-based)",
        autorange="reversed",
        tickvals=layer_ticks(layers),
        showgrid=False,
        zeroline=False,
    )
    # Wide cells: wherever the pointer is, the nearest marker is meant.
    return finish(figure, min(190 + 19 * len(layers), 820)).update_layout(hoverdistance=-1)


def interventions(
    table: pd.DataFrame, first: int | None = None, selected: int | None = None
) -> go.Figure:
    """Change of the loss when massive activations are set at one layer's output.

    Args:
        table: ``results/interventions.parquet``.
        first: the first outlier layer, marked.
        selected: a layer chosen by the user, marked.
    """
    figure = go.Figure()
    for name, (label, colour, dash, symbol) in INTERVENTIONS.items():
        rows = table[table["intervention"] == name].sort_values("layer")
        figure.add_scatter(
            x=rows["layer"],
            y=rows["change"],
            name=label,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 10 if name == "mean" else 7},
            customdata=[
                [int(k), number(v), _perplexity(v)]
                for k, v in zip(rows["layer"], rows["loss"], strict=True)
            ],
            hovertemplate="layer %{x}: %{y:+.4g} nats<br>loss %{customdata[1]}, perplexity "
            "%{customdata[2]}<extra></extra>",
        )
    mark(figure, first, selected)
    layer_axis(figure, sorted(table["layer"].unique().astype(int).tolist()))
    figure.update_yaxes(title="change of the loss, nats", zeroline=True)
    return finish(figure, 380).update_layout(margin_t=64, legend_y=1.1)


def _perplexity(loss: float) -> str:
    return number(float(np.exp(loss))) if math.isfinite(loss) and loss < 300 else "not finite"
