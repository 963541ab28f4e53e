"""Figures of an activation scan: profile by layer, layer x channel, layer x token.

Several scans are compared on one scale: :func:`log_range` of all of them, given to each figure.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from zo_core.plots.style import (
    ACCENT,
    GREY,
    OKABE_ITO,
    explain_outline,
    finish,
    mark,
    number,
    plain,
)

Range = tuple[float, float]
"""Ends of a colour or value axis, log10."""
BANDS = (("q10", "q90", "10 to 90 %", 0.14), ("q25", "q75", "25 to 75 %", 0.22))


def log_range(*values: pd.Series) -> Range:
    """The log10 range of all positive finite values; (0, 1) if there are none."""
    numbers = np.concatenate([v.to_numpy(dtype=float) for v in values])
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    if not len(numbers):
        return 0.0, 1.0
    return float(np.log10(numbers.min())), float(np.log10(numbers.max()))


def profile(
    layers: pd.DataFrame,
    first: int | None = None,
    selected: int | None = None,
    scale: Range | None = None,
    unit: str = "channel",
) -> go.Figure:
    """Top-1..3, median and quantile bands of the magnitudes by layer, log axis.

    Args:
        layers: ``results/layers.parquet`` of a scan, or one part of its ``parts.parquet``.
        first: the first outlier layer, marked if given.
        selected: a layer chosen by the user, marked if given.
        scale: range of the axis; None: the data's.
        unit: what a channel is called.
    """
    table = layers.sort_values("layer")
    figure = go.Figure()
    for low, high, name, opacity in BANDS:
        if low not in table:  # a scan of an earlier version
            continue
        for column, fill in ((low, None), (high, "tonexty")):
            figure.add_scatter(
                x=table["layer"],
                y=table[column].where(table[column] > 0),
                name=name,
                mode="lines",
                line={"width": 0},
                fill=fill,
                fillcolor=f"rgba(0,158,115,{opacity})",
                hoverinfo="skip",
                showlegend=fill is not None,
            )
    lines = (
        ("top1", "top-1", OKABE_ITO[0], "solid", "circle"),
        ("top2", "top-2", OKABE_ITO[4], "dash", "square"),
        ("top3", "top-3", OKABE_ITO[5], "dot", "diamond"),
        ("median", "median", OKABE_ITO[2], "dashdot", "x"),
    )
    for column, name, colour, dash, symbol in lines:
        has_token = f"{column}_token" in table
        where = (
            [
                f"<br>token {plain(t)} at position {p}, {unit} {c}"
                for t, p, c in zip(
                    table[f"{column}_token"],
                    table[f"{column}_position"],
                    table[f"{column}_channel"],
                    strict=True,
                )
            ]
            if has_token
            else [""] * len(table)
        )
        figure.add_scatter(
            x=table["layer"],
            y=table[column].where(table[column] > 0),
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 6},
            customdata=where,
            hovertemplate="layer %{x}: " + name + " %{y:.4g}%{customdata}<extra></extra>",
        )
    mark(figure, first, selected)
    ticks = table["layer"].astype(int).tolist()
    if len(ticks) > 40:
        ticks = [k for k in ticks if k < 0 or k % 5 == 0]
    figure.update_xaxes(
        title="layer (0-based)",
        tickvals=ticks,
        ticktext=["emb" if k < 0 else str(k) for k in ticks],
    )
    figure.update_yaxes(title="magnitude (log scale)", type="log", dtick=1, tickformat=",~g")
    if scale is not None:
        margin = 0.04 * (scale[1] - scale[0])
        figure.update_yaxes(range=[scale[0] - margin, scale[1] + margin])
    # The marker's name takes the line between the legend and the plot.
    return finish(figure, 400).update_layout(margin_t=64, legend_y=1.1)


def kurtosis(layers: pd.DataFrame, first: int | None = None) -> go.Figure:
    """Kurtosis of the signed activations by layer, log axis; 3 is that of a normal distribution.

    Args:
        layers: as for :func:`profile`.
        first: the first outlier layer, marked if given.
    """
    table = layers.sort_values("layer")
    figure = go.Figure()
    figure.add_scatter(
        x=table["layer"],
        y=table["kurtosis"].where(table["kurtosis"] > 0),
        name="kurtosis",
        mode="lines+markers",
        line={"color": OKABE_ITO[1], "width": 2},
        hovertemplate="layer %{x}: kurtosis %{y:.4g}<extra></extra>",
    )
    figure.add_hline(y=3, line={"color": GREY, "width": 1, "dash": "dash"})
    figure.add_annotation(
        x=1,
        xref="paper",
        xanchor="right",
        y=math.log10(3),
        yanchor="bottom",
        text="normal distribution: 3",
        showarrow=False,
        font={"color": GREY},
    )
    if first is not None:
        figure.add_vline(x=first, line={"color": ACCENT, "width": 1.5, "dash": "dot"})
    figure.update_xaxes(title="layer (0-based)")
    figure.update_yaxes(title="kurtosis (log scale)", type="log", dtick=1, tickformat=",~g")
    return finish(figure, 260)


def top_channels(channels: pd.DataFrame, count: int = 64) -> list[int]:
    """The channels of the largest magnitudes in any layer, strongest first."""
    blocks = channels[channels["layer"] >= 0]
    peak = blocks.groupby("channel")["magnitude"].max()
    return [int(c) for c in peak.nlargest(count).index]


def channel_heatmap(
    channels: pd.DataFrame,
    first: int | None = None,
    selected: int | None = None,
    shown: Sequence[int] | None = None,
    scale: Range | None = None,
    unit: str = "channel",
    n_layers: int | None = None,
) -> go.Figure:
    """Layer x channel: the largest magnitude of every channel of every layer.

    A layer without such a part, or with fewer channels, has no cell there.

    Args:
        channels: the rows of one part of ``results/channels.parquet`` of a scan.
        first: the first outlier layer, outlined.
        selected: a layer chosen by the user, marked at the side.
        shown: channels, in order; None: :func:`top_channels`.
        scale: range of the colours; None: the data's.
        unit: what a channel is called.
        n_layers: layers of the model; None: up to the last one of ``channels``.
    """
    blocks = channels[channels["layer"] >= 0]
    columns = top_channels(channels) if shown is None else list(shown)
    matrix = blocks[blocks["channel"].isin(columns)].pivot(
        index="layer", columns="channel", values="magnitude"
    )
    rows = range(int(blocks["layer"].max()) + 1 if n_layers is None else n_layers)
    matrix = matrix.reindex(index=rows, columns=columns)
    names = [str(c) for c in columns]
    hovers = [f"{unit} {c}" for c in names]
    figure = _magnitudes(matrix, names, hovers, columns, first, selected, scale)
    figure.update_xaxes(title=f"top {len(names)} {unit}s by largest magnitude, strongest first")
    return figure


def token_heatmap(
    tokens: pd.DataFrame,
    sequence: int = 0,
    start: int = 0,
    count: int = 64,
    first: int | None = None,
    selected: int | None = None,
    scale: Range | None = None,
) -> go.Figure:
    """Layer x token of one sequence: the largest magnitude at every token.

    Args:
        tokens: ``results/tokens.parquet`` of a scan.
        sequence: which of its sequences.
        start: first position shown.
        count: number of positions shown.
        first: the first outlier layer, outlined.
        selected: a layer chosen by the user, marked at the side.
        scale: range of the colours; None: the data's.
    """
    shown = tokens[
        (tokens["sequence"] == sequence)
        & (tokens["layer"] >= 0)
        & (tokens["position"] >= start)
        & (tokens["position"] < start + count)
    ]
    matrix = shown.pivot(index="layer", columns="position", values="magnitude")
    words = shown.drop_duplicates("position").set_index("position")["token"]
    names = [plain(str(words[p])[:14]) for p in matrix.columns]
    hovers = [f"token {n} at position {p}" for n, p in zip(names, matrix.columns, strict=True)]
    figure = _magnitudes(matrix, names, hovers, list(matrix.columns), first, selected, scale)
    figure.update_xaxes(title="token, in order of position", tickangle=-60)
    return figure


def _magnitudes(
    matrix: pd.DataFrame,
    names: Sequence[str],
    hovers: Sequence[str],
    keys: Sequence[int],
    first: int | None,
    selected: int | None,
    scale: Range | None,
) -> go.Figure:
    """Heatmap of magnitudes (rows: layers) under invisible markers that take hover and clicks."""
    values = matrix.to_numpy(dtype=float)
    logs = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))
    low, high = scale or log_range(pd.Series(values.ravel()))
    ticks = _log_ticks(low, high)
    layers = [int(k) for k in matrix.index]
    columns = [str(key) for key in keys]
    figure = go.Figure(
        go.Heatmap(
            z=logs,
            x=columns,
            y=layers,
            zmin=low,
            zmax=max(high, low + 1e-9),
            colorscale="Cividis",
            hoverinfo="skip",
            xgap=0,
            ygap=1,
            colorbar={
                "title": {"text": "magnitude<br>(log scale)", "side": "top"},
                "tickvals": [math.log10(t) for t in ticks],
                "ticktext": [f"{t:,g}" for t in ticks],
                "thickness": 12,
                "outlinewidth": 0,
            },
        )
    )
    # Plotly reports no selection for heatmap cells, but does for markers on top of them.
    figure.add_scatter(
        x=columns * len(layers),
        y=np.repeat(layers, len(columns)).tolist(),
        mode="markers",
        marker={"symbol": "square", "size": 10, "opacity": 0},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
        customdata=[
            [layer, int(key), hover, "none" if math.isnan(value) else number(value)]
            for layer, row in zip(layers, values, strict=True)
            for key, hover, value in zip(keys, hovers, row, strict=True)
        ],
        hovertemplate="layer %{customdata[0]}, %{customdata[2]}<br>"
        "magnitude %{customdata[3]}<extra></extra>",
        showlegend=False,
    )
    edge = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "fillcolor": "rgba(0,0,0,0)"}
    if selected is not None and selected != first:
        figure.add_shape(
            **edge,
            y0=selected - 0.5,
            y1=selected + 0.5,
            line={"color": GREY, "width": 2, "dash": "dot"},
        )
    if first is not None:
        figure.add_shape(
            **edge, y0=first - 0.5, y1=first + 0.5, line={"color": ACCENT, "width": 2.5}
        )
        explain_outline(figure, first)
    shown = layers if len(layers) <= 40 else [k for k in layers if k % 5 == 0 or k == first]
    figure.update_yaxes(
        title="layer (0-based)",
        autorange="reversed",
        tickvals=shown,
        ticktext=[
            f'<b><span style="color:{ACCENT}">{k}</span></b>' if k == first else str(k)
            for k in shown
        ],
        showgrid=False,
        zeroline=False,
    )
    # A category axis leaves labels out where they would overlap.
    figure.update_xaxes(
        type="category",
        labelalias=dict(zip(columns, names, strict=True)),
        tickfont={"size": 11},
        showgrid=False,
        zeroline=False,
        range=[-0.5, len(names) - 0.5],
    )
    return finish(figure, min(190 + 19 * len(layers), 820))


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in real units for a log colour bar: decades, or 1-2-5 if there are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    steps = (1,) if high - low > 3 else (1, 2, 5)
    ticks = [s * 10.0**d for d in decades for s in steps]
    return [t for t in ticks if low - 0.01 <= math.log10(t) <= high + 0.01]
