"""Figures of how a perturbation travels: layer x layer, and what equalising leaves of it."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from zo_core.plots.style import ACCENT, GREY, OKABE_ITO, explain_outline, finish, mark, number

QUANTITIES = {"relative_change": "Relative change", "amplification": "Amplification"}


def layer_ticks(layers: Sequence[int]) -> list[int]:
    """Layers named on an axis: all, or every fifth of many."""
    return list(layers) if len(layers) <= 40 else [k for k in layers if k % 5 == 0]


def layer_axis(figure: go.Figure, layers: Sequence[int], title: str = "layer (0-based)") -> None:
    """The x axis of a figure by layer."""
    figure.update_xaxes(
        range=[min(layers) - 0.6, max(layers) + 0.6] if layers else None,
        title=title,
        tickvals=layer_ticks(sorted(layers)),
        showgrid=False,
        zeroline=False,
    )


def propagation(
    table: pd.DataFrame,
    quantity: str,
    first: int | None = None,
    selected: int | None = None,
) -> go.Figure:
    """Perturbed layer x measured block, log scale; blocks below the perturbed layer do not change.

    Args:
        table: ``results/propagation.parquet`` of a probe.
        quantity: a key of :data:`QUANTITIES`. Relative change in Cividis; amplification in RdBu_r,
            white where the change at the layer's own output has neither grown nor shrunk.
        first: the first outlier layer of a scan, outlined.
        selected: a layer chosen by the user, outlined with dots.
    """
    matrix = table.pivot(index="layer", columns="block", values=quantity)
    # Layers that were not probed leave gaps, so that all cells have one size.
    ends = range(int(matrix.index.min()), int(matrix.index.max()) + 1)
    matrix = matrix.reindex(index=ends)
    values = matrix.to_numpy(dtype=float)
    logs = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))
    finite = logs[np.isfinite(logs)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if quantity == "amplification":
        high = max(abs(low), abs(high), 0.05)
        low = -high
    high = max(high, low + 1e-9)
    layers, blocks = [int(k) for k in matrix.index], [int(k) for k in matrix.columns]
    ticks = _round_numbers(low, high)
    figure = go.Figure(
        go.Heatmap(
            z=logs,
            x=blocks,
            y=layers,
            zmin=low,
            zmax=high,
            colorscale="Cividis" if quantity == "relative_change" else "RdBu_r",
            hoverinfo="skip",
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": f"{QUANTITIES[quantity].lower()}<br>(log scale)", "side": "top"},
                "tickvals": [math.log10(t) for t in ticks],
                "ticktext": [f"{t:g}" for t in ticks],
                "thickness": 12,
                "outlinewidth": 0,
            },
        )
    )
    # Plotly reports no selection for heatmap cells, but does for markers on top of them.
    shown = table[["layer", "block", "relative_change", "amplification"]]
    figure.add_scatter(
        x=shown["block"],
        y=shown["layer"],
        mode="markers",
        marker={"symbol": "square", "size": 12, "opacity": 0},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
        customdata=[[int(k), number(c), number(a)] for k, _, c, a in shown.itertuples(index=False)],
        hovertemplate="layer %{y} perturbed, output of block %{x}<br>relative change "
        "%{customdata[1]}, %{customdata[2]} x that of block %{y}<extra></extra>",
        showlegend=False,
    )
    for layer, line in (
        (selected, {"color": GREY, "width": 2, "dash": "dot"}),
        (first, {"color": ACCENT, "width": 2.5}),
    ):
        if layer in layers and not (layer == first and line["color"] == GREY):
            figure.add_shape(
                type="rect",
                x0=layer - 0.5,
                x1=blocks[-1] + 0.5,
                y0=layer - 0.5,
                y1=layer + 0.5,
                line=line,
            )
    if first in layers:
        explain_outline(figure, first)
    layer_axis(figure, blocks, "block whose output is measured (0-based)")
    figure.update_yaxes(
        title="perturbed layer (0-based)",
        autorange="reversed",
        tickvals=layer_ticks(layers),
        showgrid=False,
        zeroline=False,
    )
    # Wide cells: wherever the pointer is, the nearest marker is meant.
    return finish(figure, min(200 + 22 * len(layers), 760)).update_layout(hoverdistance=-1)


def _round_numbers(low: float, high: float) -> list[float]:
    """Numbers for a log colour bar between two powers of ten."""
    steps = (1,) if high - low > 3 else (1, 2, 5) if high - low > 0.3 else (1, 1.2, 1.5, 2, 3, 5, 8)
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [s * 10.0**d for d in decades for s in steps]
    return [t for t in ticks if low - 0.01 <= math.log10(t) <= high + 0.01]


def ablation(
    table: pd.DataFrame, first: int | None = None, selected: int | None = None
) -> go.Figure:
    """What reaches the loss from each layer over the median layer's, plain and equalised.

    Args:
        table: ``results/ablation.parquet`` of a probe.
        first: the first outlier layer, marked.
        selected: a layer chosen by the user, marked.
    """
    figure = go.Figure()
    for name, label, colour, dash, symbol in (
        ("plain", "one eps for all", OKABE_ITO[5], "dash", "square"),
        ("equalised", "equal change at the layer's own output", OKABE_ITO[1], "solid", "circle"),
    ):
        figure.add_scatter(
            x=table["layer"],
            y=table[f"{name}_relative"],
            name=label,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 8},
            customdata=table[["layer", name, f"{name}_own_change"]].to_numpy().tolist(),
            hovertemplate="layer %{x}: %{y:.3g} x the median layer<br>loss shift "
            "%{customdata[1]:.3g} nats, own output changes by %{customdata[2]:.3g}<extra></extra>",
        )
    figure.add_hline(y=1, line={"color": GREY, "width": 1, "dash": "dot"})
    mark(figure, first, selected)
    layer_axis(figure, table["layer"].astype(int).tolist())
    figure.update_yaxes(title="loss shift / median layer's", rangemode="tozero")
    return finish(figure, 360).update_layout(margin_t=64, legend_y=1.1)
