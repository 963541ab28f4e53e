"""Figures of a comparison: differences of arms, loss curves of all cells, gain by layer."""

import html
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from zo_core.plots.probe import intervals
from zo_core.plots.style import ACCENT, GREY, OKABE_ITO, finish, mark

PANEL_HEIGHT = 150
FELT = "abs_projected_gradient"


def differences(arms: pd.DataFrame, baseline: str, margin: float) -> go.Figure:
    """Mean paired difference to the baseline by arm, with 95 % bootstrap intervals.

    Args:
        arms: rows of one task: ``arm, difference, low, high, pairs, p_holm`` as shares.
        baseline: name of the arm that differences are to.
        margin: half the width of the band that counts as no difference.
    """
    table = arms[arms["difference"].notna()].iloc[::-1]
    points = 100 * table["difference"].astype(float)
    spread = {
        side: (100 * sign * (table[side].astype(float) - table["difference"].astype(float)))
        .fillna(0.0)
        .tolist()
        for side, sign in (("low", -1), ("high", 1))
    }
    hover = [
        f"{html.escape(row.arm)}: {100 * row.difference:+.2f} points, {row.pairs:.0f} pairs"
        + ("" if pd.isna(row.p_holm) else f"<br>p {row.p_holm:.3g} (Holm)")
        for row in table.itertuples()
    ]
    figure = go.Figure(
        go.Scatter(
            x=points,
            y=[html.escape(name) for name in table["arm"]],
            mode="markers",
            marker={"size": 9, "color": OKABE_ITO[1], "symbol": "diamond"},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": spread["high"],
                "arrayminus": spread["low"],
                "color": GREY,
                "thickness": 1.5,
                "width": 4,
            },
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
        )
    )
    figure.add_vrect(
        x0=-100 * margin, x1=100 * margin, fillcolor=GREY, opacity=0.15, line_width=0, layer="below"
    )
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    figure.update_xaxes(
        title=f"difference to {html.escape(baseline)} (points); band: ±{100 * margin:g}"
    )
    figure.update_yaxes(automargin=True, type="category")
    return finish(figure, max(220, 110 + 24 * len(table)))


def small_multiples(
    curves: pd.DataFrame, arms: list[str], baseline: str | None = None, columns: int = 4
) -> go.Figure:
    """Training loss of every cell, a panel an arm and a line a seed, all on the same axes.

    Args:
        curves: of one task: ``arm, seed, forward_passes, loss``.
        arms: the panels, in order.
        baseline: an arm whose mean over seeds is drawn into every panel, dashed.
        columns: panels in a row.
    """
    columns = max(1, min(columns, len(arms)))
    rows = max(1, math.ceil(len(arms) / columns))
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=[html.escape(arm) for arm in arms],
        horizontal_spacing=0.02,
        vertical_spacing=min(0.2, 34 / (PANEL_HEIGHT * rows)),
    )
    reference = curves[curves["arm"] == baseline]
    if reference["seed"].nunique() > 1:
        reference = reference.groupby("forward_passes", as_index=False)["loss"].mean()
    for i, arm in enumerate(arms):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        if baseline is not None and arm != baseline and len(reference):
            figure.add_scatter(
                x=reference["forward_passes"],
                y=reference["loss"],
                mode="lines",
                line={"color": GREY, "width": 1.5, "dash": "dot"},
                hoverinfo="skip",
                showlegend=False,
                **place,
            )
        for k, (seed, line) in enumerate(curves[curves["arm"] == arm].groupby("seed")):
            figure.add_scatter(
                x=line["forward_passes"],
                y=line["loss"],
                mode="lines" if len(line) > 1 else "markers",
                line={"color": OKABE_ITO[(k + 1) % len(OKABE_ITO)], "width": 1.3},
                hovertemplate=f"seed {seed}: loss %{{y:.4f}} after %{{x:,}} forward passes"
                "<extra></extra>",
                showlegend=False,
                **place,
            )
    figure.update_xaxes(rangemode="tozero", nticks=4, tickformat="~s")
    figure.update_yaxes(range=_loss_range(curves["loss"].to_numpy(dtype=float)))
    figure.update_xaxes(title="forward passes", row=rows)
    figure.update_yaxes(title="loss (nats)", col=1)
    figure.update_annotations(font_size=12)
    finish(figure, 70 + PANEL_HEIGHT * rows)
    return figure.update_layout(margin={"t": 28, "b": 8, "l": 8, "r": 8})


def _loss_range(loss: np.ndarray) -> list[float] | None:
    """Limits that a run which went up does not take away from all others."""
    loss = loss[np.isfinite(loss)]
    if not len(loss):
        return None
    low, middle, high = np.quantile(loss, [0, 0.5, 0.98])
    high = min(high, middle + 4 * max(middle - low, 0.05))
    room = 0.06 * max(high - low, 0.02)
    return [float(low - room), float(high + room)]


def layer_sweep(
    gains: pd.DataFrame,
    activation: pd.DataFrame,
    sensitivity: pd.DataFrame,
    dominant: int | None = None,
    full: float | None = None,
) -> go.Figure:
    """Measured gain by layer over the activation profile and the sensitivity profile, on one axis.

    Args:
        gains: of one task: ``layer, n, mean, low, high``, shares.
        activation: ``layer, top1, median`` of a scan; may be empty.
        sensitivity: ``layer, metric, mean, se, n`` of a probe; may be empty.
        dominant: the first outlier layer, marked in all panels.
        full: mean gain of the full scope, a line to hold the layers against.
    """
    panels = [("gain (points)", 0.46)]
    panels += [("magnitude (log)", 0.27)] if len(activation) else []
    panels += [("mean |g|", 0.27)] if len(sensitivity) else []
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.05,
        row_heights=[height for _, height in panels],
    )
    _bars(figure, gains, 100.0, 1, dominant, "gain %{y:+.2f} points", "units")
    if full is not None:
        figure.add_hline(
            y=100 * full,
            line={"color": OKABE_ITO[1], "dash": "dash", "width": 1.5},
            annotation_text="full",
            annotation_position="top right",
            annotation_font_color=OKABE_ITO[1],
            row=1,
            col=1,
        )
    row = 1
    if len(activation):
        row += 1
        for column, name, colour, dash, symbol in (
            ("top1", "top-1 activation", OKABE_ITO[4], "solid", "circle"),
            ("median", "median activation", OKABE_ITO[2], "dashdot", "x"),
        ):
            figure.add_scatter(
                x=activation["layer"],
                y=activation[column],
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 2},
                marker={"symbol": symbol, "size": 6},
                hovertemplate=f"layer %{{x}}: {name} %{{y:.4g}}<extra></extra>",
                row=row,
                col=1,
            )
        figure.update_yaxes(type="log", dtick=1, tickformat=",~g", row=row, col=1)
    if len(sensitivity):
        row += 1
        felt = intervals(sensitivity.assign(se=sensitivity["se"].astype(float)), FELT)
        _bars(figure, felt, 1.0, row, dominant, "mean |g| %{y:.4g}", "draws")
    for i, (title, _) in enumerate(panels):
        figure.update_yaxes(title=title, row=i + 1, col=1)
    mark(figure, dominant)
    layers = sorted({*gains["layer"], *activation["layer"], *sensitivity["layer"]})
    figure.update_xaxes(tickvals=layers if len(layers) <= 40 else layers[::5])
    figure.update_xaxes(title="layer (0-based)", row=len(panels), col=1)
    finish(figure, 180 + 150 * len(panels))
    return figure.update_layout(margin_t=64, legend_y=1.07)


def _bars(
    figure: go.Figure,
    table: pd.DataFrame,
    scale: float,
    row: int,
    dominant: int | None,
    hover: str,
    counted: str,
) -> None:
    """Means by layer with intervals; the dominant layer in the accent colour."""
    values = {name: scale * table[name].astype(float) for name in ("mean", "low", "high")}
    marked = table["layer"] == dominant
    figure.add_bar(
        x=table["layer"],
        y=values["mean"],
        marker={
            "color": np.where(marked, ACCENT, "#56B4E9").tolist(),
            "pattern": {"shape": np.where(marked, "/", "").tolist()},
        },
        error_y={
            "type": "data",
            "symmetric": False,
            "array": (values["high"] - values["mean"]).fillna(0.0),
            "arrayminus": (values["mean"] - values["low"]).fillna(0.0),
            "color": GREY,
            "thickness": 1.5,
            "width": 4,
        },
        customdata=table["n"],
        hovertemplate=f"layer %{{x}}: {hover}, %{{customdata}} {counted}<extra></extra>",
        showlegend=False,
        row=row,
        col=1,
    )
