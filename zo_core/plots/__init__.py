"""Figures of the app and of the exported reports: tables in, plotly figures out.

Conventions: layer on y with layer 0 on top, magnitudes on a log scale in Cividis with a colour bar
in real units, Okabe-Ito lines told apart by dash or marker as well, transparent backgrounds (light
and dark both work), and one accent, vermillion, for the first outlier layer.
"""

from zo_core.plots.probe import METRICS, overlapping, sensitivity
from zo_core.plots.rules import layer_weights, named_layers
from zo_core.plots.scan import (
    channel_heatmap,
    kurtosis,
    log_range,
    profile,
    token_heatmap,
    top_channels,
)
from zo_core.plots.style import number, visible
from zo_core.plots.tune import AXES, CURVE_POINTS, loss_curve, overlay, smooth, thin

__all__ = [
    "AXES",
    "CURVE_POINTS",
    "METRICS",
    "channel_heatmap",
    "kurtosis",
    "layer_weights",
    "log_range",
    "loss_curve",
    "named_layers",
    "number",
    "overlapping",
    "overlay",
    "profile",
    "sensitivity",
    "smooth",
    "thin",
    "token_heatmap",
    "top_channels",
    "visible",
]
