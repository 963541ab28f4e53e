"""Figures of fine-tuning: the loss curve of a run and several runs over each other."""

import html
from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from zo_core.plots.style import ACCENT, DASHES, OKABE_ITO, finish

CURVE_POINTS = 2000
AXES = {"step": "steps", "forward_passes": "forward passes", "seconds": "time (s)"}
"""Columns that a loss curve can be drawn against."""
METRICS_DRAWN = {"accuracy": "accuracy", "f1": "F1"}
"""Main metrics of tasks."""


def thin(x: np.ndarray, y: np.ndarray, limit: int = CURVE_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most ``limit`` points of a curve: the smallest and largest of each stretch.

    Peaks survive, and a stretch of only non-finite values leaves one, which draws as a gap.
    """
    if len(x) <= limit:
        return x, y
    keep = []
    for stretch in np.array_split(np.arange(len(x)), limit // 2):
        part = y[stretch]
        if np.isfinite(part).any():
            ends = {int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])}
            keep.extend(sorted(ends))
        else:
            keep.append(int(stretch[0]))
    return x[keep], y[keep]


def smooth(loss: np.ndarray, span: int) -> np.ndarray:
    """Exponential moving average over about ``span`` steps; non-finite values are passed over."""
    return pd.Series(loss).ewm(span=span, adjust=True).mean().to_numpy()


def loss_curve(
    steps: pd.DataFrame,
    evals: pd.DataFrame,
    axis: str = "step",
    span: int = 50,
    uirevision: str = "",
    metric: str = "accuracy",
    dev: pd.DataFrame | None = None,
    best: int | None = None,
) -> go.Figure:
    """Training loss, raw and smoothed, with the dev loss, above the main metric of evaluations.

    Args:
        steps: columns ``step, loss, forward_passes, seconds`` (the last two cumulative).
        evals: columns ``step`` and ``metric``.
        axis: a key of :data:`AXES`.
        span: steps of the moving average.
        uirevision: zoom survives redraws while this stays the same.
        metric: the column of ``evals`` and ``dev`` that is drawn, a share.
        dev: evaluations of dev rows, with columns ``step``, ``loss`` and ``metric``.
        best: the step that is marked as the best by dev loss.
    """
    title = METRICS_DRAWN[metric]
    dev = pd.DataFrame() if dev is None else dev
    rows = 1 if evals.empty and dev.empty else 2
    figure = make_subplots(
        rows=rows,
        cols=1,
        shared_xaxes=True,
        row_heights=[0.68, 0.32][:rows],
        vertical_spacing=0.06,
    )
    x = steps[axis].to_numpy(dtype=float)
    loss = steps["loss"].to_numpy(dtype=float)
    hover = f"{AXES[axis]} %{{x:,.6~g}}: loss %{{y:.4f}}<extra></extra>"
    for y, name, line in (
        (loss, "loss", {"color": "#3A9BD9", "width": 1.2}),
        (smooth(loss, span), f"smoothed (EMA over {span} steps)", {"color": ACCENT, "width": 2.5}),
    ):
        px, py = thin(x, y)
        figure.add_scatter(
            x=px,
            y=py,
            name=name,
            mode="lines" if len(px) > 1 else "markers",
            line=line,
            opacity=0.75 if name == "loss" else 1,
            hovertemplate=hover,
            row=1,
            col=1,
        )
    broken = steps[~np.isfinite(loss)]
    if not broken.empty:
        figure.add_scatter(
            x=broken[axis],
            y=[float(np.nanmin(loss)) if np.isfinite(loss).any() else 0.0] * len(broken),
            name="loss is not finite",
            mode="markers",
            row=1,
            col=1,
            marker={"symbol": "x", "size": 9, "color": OKABE_ITO[3]},
            hovertemplate=f"{AXES[axis]} %{{x}}: loss is not finite<extra></extra>",
        )
    # An evaluation happens at a step; on the other axes it sits where that step was.
    taken = np.concatenate([[0.0], steps["step"].to_numpy(dtype=float)])
    reached = np.concatenate([[0.0], x])
    for table, split, line, marker in (
        (evals, "validation", {"color": OKABE_ITO[2], "dash": "dot", "width": 2}, "diamond"),
        (dev, "dev", {"color": OKABE_ITO[3], "width": 1.5}, "circle"),
    ):
        if table.empty:
            continue
        panels = [(2, metric, 100.0, f"{title} %{{y:.1f}} %")]
        if split == "dev":  # the loss that chooses, where the training loss is
            panels.append((1, "loss", 1.0, "loss %{y:.4f}"))
        for row, column, scale, shown in panels:
            figure.add_scatter(
                x=np.interp(table["step"].to_numpy(dtype=float), taken, reached),
                y=scale * table[column].to_numpy(dtype=float),
                name=f"{split} {title if row == 2 else column}",
                mode="lines+markers",
                line=line,
                marker={"symbol": marker, "size": 9},
                cliponaxis=False,
                row=row,
                col=1,
                customdata=table["step"],
                hovertemplate=f"step %{{customdata}}: {split} {shown}<extra></extra>",
            )
    if rows == 2:
        shares = pd.concat([t[metric] for t in (evals, dev) if not t.empty])
        figure.update_yaxes(title=f"{title} (%)", range=_share_range(shares), row=2, col=1)
    if best is not None:
        figure.add_vline(
            x=float(np.interp(best, taken, reached)),
            line={"color": OKABE_ITO[3], "dash": "dash", "width": 1.5},
        )
        figure.add_annotation(
            x=float(np.interp(best, taken, reached)),
            y=1,
            yref="y domain",
            text=f"best dev loss: step {best:,}",
            showarrow=False,
            xanchor="left",
            yanchor="top",
            font={"color": OKABE_ITO[3], "size": 12},
        )
    figure.update_yaxes(title="loss (nats)", row=1, col=1)
    figure.update_xaxes(title=AXES[axis], rangemode="tozero", row=rows, col=1)
    if axis != "seconds" and len(x) and np.nanmax(x) < 10:  # plotly would put ticks at halves
        figure.update_xaxes(tickmode="linear", tick0=0, dtick=1)
    if axis != "seconds":
        figure.update_xaxes(tickformat=",d")
    figure.update_layout(uirevision=uirevision)
    return finish(figure, 520)


def _share_range(share: pd.Series) -> list[float]:
    """Limits in percent that do not turn a few rows of difference into a cliff."""
    percent = 100 * share.to_numpy(dtype=float)
    percent = percent[np.isfinite(percent)]
    if not len(percent):
        return [0.0, 100.0]
    low, high = float(percent.min()), float(percent.max())
    room = max(0.15 * (high - low), (20 - (high - low)) / 2)
    return [max(0.0, low - room), min(100.0, high + room)]


def overlay(curves: Mapping[str, pd.DataFrame], axis: str = "step", span: int = 50) -> go.Figure:
    """Smoothed loss curves of several runs, told apart by colour and dash.

    Args:
        curves: label -> columns ``step, loss, forward_passes, seconds``.
        axis: a key of :data:`AXES`.
        span: steps of the moving average.
    """
    figure = go.Figure()
    for i, (label, steps) in enumerate(curves.items()):
        loss = smooth(steps["loss"].to_numpy(dtype=float), span)
        x, y = thin(steps[axis].to_numpy(dtype=float), loss)
        figure.add_scatter(
            x=x,
            y=y,
            name=html.escape(label, quote=False),
            mode="lines",
            line={
                "color": OKABE_ITO[i % len(OKABE_ITO)],
                "dash": DASHES[(i // len(OKABE_ITO) + i) % len(DASHES)],
                "width": 2,
            },
            hovertemplate="%{x:,.6~g}: loss %{y:.4f}<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(title=AXES[axis], rangemode="tozero")
    figure.update_yaxes(title=f"loss (nats), EMA over {span} steps")
    figure.update_layout(uirevision=f"overlay-{axis}")
    return finish(figure, 440)
