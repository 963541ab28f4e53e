"""What all figures share: colours, words for layers, numbers and tokens, and the layout."""

import html
import math

import plotly.graph_objects as go

ACCENT = "#D55E00"
OKABE_ITO = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
GREY = "#8A94A0"


def number(value: float | None) -> str:
    """A magnitude in at most four significant places, without exponents in the usual range."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def visible(token: object) -> str:
    """A token with its invisible characters made visible: ``␣film``, ``⏎``."""
    text = str(token).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text) or "(empty)"


def plain(token: object) -> str:
    """A visible token that plotly, which reads some HTML, shows as it is."""
    return html.escape(visible(token), quote=False)


def finish(figure: go.Figure, height: int) -> go.Figure:
    """The look that every figure shares."""
    return figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": 36, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": ACCENT},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )


def mark(figure: go.Figure, first: int | None, selected: int | None = None) -> None:
    """Vertical lines at the first outlier layer and at the chosen one."""
    if selected is not None and selected != first:
        figure.add_vline(x=selected, line={"color": GREY, "width": 1.5, "dash": "dot"})
    if first is not None:
        figure.add_vline(x=first, line={"color": ACCENT, "width": 1.5, "dash": "dot"})
        figure.add_annotation(
            x=first,
            y=1,
            yref="paper",
            yanchor="bottom",
            text=f"first outlier layer {first}",
            showarrow=False,
            font={"color": ACCENT, "size": 13},
        )


def explain_outline(figure: go.Figure, first: int) -> None:
    """Say above a heatmap what its outlined row is."""
    figure.add_annotation(
        x=0,
        xref="paper",
        xanchor="left",
        y=1,
        yref="paper",
        yanchor="bottom",
        showarrow=False,
        text=f"outlined: layer {first}, the first outlier layer",
        font={"color": ACCENT, "size": 13},
    )
