"""A plotly chart that takes new data in place, for runs that are being followed.

``st.plotly_chart`` makes a new chart for every new figure: zoom is lost each second, and a pointer
that was dragging on the old chart raises errors in the browser. Here new data goes to the same
chart (``Plotly.react``), which keeps the zoom for as long as ``uirevision`` stays the same.
"""

import json

import plotly.graph_objects as go
import streamlit as st

_JS = """
export default function ({ data, parentElement }) {
  const chart = parentElement.querySelector(".live-chart");
  const waiting = chart.figure !== undefined && !chart.classList.contains("js-plotly-plot");
  chart.figure = data.figure;
  if (!waiting) draw(chart);
}

function draw(chart) {
  if (!window.Plotly) {
    setTimeout(() => chart.isConnected && draw(chart), 50);
    return;
  }
  const css = getComputedStyle(chart);
  const theme = (name) => css.getPropertyValue("--st-" + name).trim();
  const line = theme("border-color");
  const axis = { gridcolor: line, zerolinecolor: line, tickcolor: line, automargin: true,
                 title: { standoff: 14 } };
  const { data, layout } = JSON.parse(chart.figure);
  layout.template = { layout: {
    font: { family: theme("font"), color: theme("text-color"), size: 12 },
    xaxis: { ...axis, showgrid: false }, yaxis: axis,
    hoverlabel: { bgcolor: theme("background-color"), bordercolor: line,
                  font: { color: theme("text-color") } },
  } };
  window.Plotly.react(chart, data, layout, { responsive: true, displaylogo: false });
}
"""

_CSS = """
.live-chart { width: 100%; }
[class*="st-key-plotly_loader"] { display: none; }
"""

_mount = st.components.v2.component(
    "zoscope_live_chart",
    html='<div class="live-chart"></div>',
    css=_CSS,
    js=_JS,
    isolate_styles=False,  # plotly's own style sheet must reach the chart
)


def live_chart(figure: go.Figure, key: str) -> None:
    """Draw a figure, or update the one drawn under this key."""
    # Streamlit serves plotly.js to the browser with the first chart of its own, as window.Plotly.
    st.plotly_chart(go.Figure(), key=f"plotly_loader_{key}")
    spec = json.loads(figure.to_json())
    spec["layout"].pop("template", None)
    _mount(data={"figure": json.dumps(spec)}, key=key, height=figure.layout.height)
