"""Figures of the app and of the exported reports: tables in, plotly figures out.

Conventions: layer on y with layer 0 on top, magnitudes on a log scale in Cividis with a colour bar
in real units, Okabe-Ito lines told apart by dash or marker as well, transparent backgrounds (light
and dark both work), and one accent, vermillion, for the first outlier layer.
"""

from zo_core.plots.compare import differences, layer_sweep, small_multiples
from zo_core.plots.gradients import distribution, eps_sweep
from zo_core.plots.mechanism import contributions, interventions, neurons, sinks
from zo_core.plots.probe import METRICS, overlapping, sensitivity
from zo_core.plots.propagation import QUANTITIES, ablation, propagation
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
    "QUANTITIES",
    "ablation",
    "channel_heatmap",
    "contributions",
    "distribution",
    "eps_sweep",
    "interventions",
    "differences",
    "layer_sweep",
    "loss_curve",
    "neurons",
    "kurtosis",
    "layer_weights",
    "log_range",
    "loss_curve",
    "named_layers",
    "number",
    "overlapping",
    "overlay",
    "profile",
    "propagation",
    "sensitivity",
    "sinks",
    "small_multiples",
    "smooth",
    "thin",
    "token_heatmap",
    "top_channels",
    "visible",
]
