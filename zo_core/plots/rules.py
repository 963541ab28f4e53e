"""Figures of the outlier rules: the layer that each names, and how OWL weighs the layers."""

import pandas as pd
import plotly.graph_objects as go

from zo_core.plots.style import ACCENT, GREY, OKABE_ITO, finish


def named_layers(table: pd.DataFrame, n_layers: int, published: int | None = None) -> go.Figure:
    """One line a rule with a marker at the layer that it names; a rule that names none is empty.

    Args:
        table: of :func:`zo_core.analysis.outliers.agreement.rules_table`.
        n_layers: number of layers.
        published: a published layer of the model, marked.
    """
    titles = table["title"].tolist()
    figure = go.Figure()
    for weighting in (False, True):
        part = table[((table["kind"] == "weighting") == weighting) & table["layer"].notna()]
        figure.add_scatter(
            x=part["layer"].astype(int),
            y=part["title"],
            mode="markers",
            name="weighting: largest share" if weighting else "names this layer",
            marker={
                "size": 13,
                "symbol": "diamond-open" if weighting else "circle",
                "color": OKABE_ITO[1] if weighting else ACCENT,
                "line": {"width": 2, "color": OKABE_ITO[1] if weighting else ACCENT},
            },
            hovertemplate="%{y}: layer %{x}<extra></extra>",
        )
    if published is not None:
        figure.add_vline(
            x=published,
            line={"color": OKABE_ITO[2], "width": 2, "dash": "dash"},
            annotation={"text": "published", "font": {"color": OKABE_ITO[2]}},
        )
    ticks = list(range(n_layers)) if n_layers <= 40 else list(range(0, n_layers, 5))
    figure.update_xaxes(title="layer (0-based)", range=[-0.6, n_layers - 0.4], tickvals=ticks)
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=titles[::-1],
        range=[-0.5, len(titles) - 0.5],
        gridcolor="rgba(138,148,160,0.25)",
    )
    return finish(figure, 90 + 28 * len(titles))


def layer_weights(weights: pd.DataFrame, m: float, first: int | None = None) -> go.Figure:
    """Bars of the share of outlying Wanda scores by layer.

    Args:
        weights: of :func:`zo_core.analysis.outliers.weights.owl_weights`.
        m: its multiple of the mean.
        first: the first outlier layer, in the accent colour.
    """
    figure = go.Figure(
        go.Bar(
            x=weights.index,
            y=100 * weights["share"],
            marker_color=[ACCENT if k == first else GREY for k in weights.index],
            customdata=100 * weights["probability"],
            hovertemplate="layer %{x}: %{y:.3g} % of scores; sampled with %{customdata:.3g} %"
            "<extra></extra>",
        )
    )
    figure.update_xaxes(title="layer (0-based)")
    figure.update_yaxes(title=f"Wanda scores above {m:g} x mean, %")
    return finish(figure, 280)
