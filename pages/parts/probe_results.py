"""What a finished probe shows below its chart: distribution, propagation, place, range of eps."""

import pandas as pd
import streamlit as st

from pages.parts import history, layer_pick
from pages.parts.words import plain
from zo_core import plots
from zo_core.reports.probe import (
    AGREEMENT,
    EPS,
    PROPAGATION,
    about_place,
    place,
    recommended,
)

TABLES = {
    "draws": "a row a layer, draw and metric",
    "layers": "mean, sd, se and n over draws",
    "propagation": "relative change of every block's output",
    "gradients": "spread, SNR and sign agreement",
    "gradients_by_batch": "g of every batch",
    "scalings": "draws of the fair perturbations",
    "scaled_layers": "the same over draws",
    "ablation": "place or sensitivity",
    "sweep": "draws of every eps",
    "linear_range": "range of eps by layer",
}
"""What the tables of a probe hold."""
LAYER = "probe_layer"
Figures = dict[str, object]
Tables = dict[str, pd.DataFrame | None]


def analyses(entry: history.Entry, found: Tables, first: int | None, n_layers: int) -> Figures:
    """Draw every analysis that the probe holds, with one chosen layer; gives the figures."""
    layers = found["layers"]
    probed = sorted(int(k) for k in layers["layer"].unique())
    most = entry.summary.get("most_sensitive_layer")
    chosen = layer_pick.restore(LAYER, entry.run_id, probed, most if most in probed else probed[0])
    figures: Figures = {}
    _distribution(found, first, chosen, figures)
    _propagation(found, first, chosen, figures)
    if found["ablation"] is not None:
        _place(entry, found["ablation"], first, chosen, figures)
    if found["sweep"] is not None and found["linear_range"] is not None:
        _range(entry, found["sweep"], found["linear_range"], chosen, figures)
    st.subheader("Layer detail", anchor=False)
    st.caption("Click a mark in a chart to choose its layer, or choose it here.")
    with st.container(key="probe_detail"):
        _detail(layer_pick.choose(LAYER, probed, n_layers), layers, found)
    return figures


def _draw(figures: Figures, title: str, figure: object, key: str, alt: str) -> None:
    st.plotly_chart(
        figure,
        key=key,
        alt=alt,
        on_select=layer_pick.clicked(key, LAYER),
        selection_mode="points",
    )
    figures[title] = figure


def _distribution(found: Tables, first: int | None, chosen: int, figures: Figures) -> None:
    draws, layers, gradients = found["draws"], found["layers"], found["gradients"]
    if draws is None or layers is None or gradients is None:
        return
    st.subheader("Distribution of projected gradients", anchor=False)
    _draw(
        figures,
        "Distribution of projected gradients",
        plots.distribution(draws, layers, first, chosen),
        "distribution_chart",
        "Projected gradients of every layer over draws of z",
    )
    if gradients["batches"].max() > 1:
        st.dataframe(
            gradients,
            hide_index=True,
            key="gradients_table",
            column_config={
                "layer": "layer (0-based)",
                **{
                    c: st.column_config.NumberColumn(c.replace("_", " "), format="%.4g")
                    for c in ("mean", "sd", "rms", "snr")
                },
                "sign_agreement": st.column_config.NumberColumn("sign agreement", format="percent"),
            },
        )
        st.caption(AGREEMENT)
    else:
        st.caption(
            "One batch: choose two or more batches to see whether another batch would give the "
            "same sign."
        )


def _propagation(found: Tables, first: int | None, chosen: int, figures: Figures) -> None:
    table = found["propagation"]
    if table is None:  # a probe of an earlier version
        return
    st.subheader("Propagation", anchor=False)
    quantity = st.segmented_control(
        "Quantity",
        list(plots.QUANTITIES),
        format_func=plots.QUANTITIES.get,
        default="relative_change",
        key="probe_quantity",
        required=True,
        persist_state="session",
    )
    _draw(
        figures,
        f"Propagation: {plots.QUANTITIES[quantity].lower()}",
        plots.propagation(table, quantity, first, chosen),
        "propagation_chart",
        "Change of every block's output when a layer is perturbed",
    )
    st.caption(PROPAGATION)


def _place(
    entry: history.Entry,
    table: pd.DataFrame,
    first: int | None,
    chosen: int,
    figures: Figures,
) -> None:
    st.subheader("Place or sensitivity?", anchor=False)
    st.markdown(plain(place(table, entry.summary.get("equalised_own_change"))))
    _draw(
        figures,
        "Loss shift, plain and equalised",
        plots.ablation(table, first, chosen),
        "ablation_chart",
        "Loss shift of every layer with one eps and with equal change at its own output",
    )
    st.caption(about_place(entry.summary.get("place_effect")))


def _range(
    entry: history.Entry,
    sweep: pd.DataFrame,
    ranges: pd.DataFrame,
    chosen: int,
    figures: Figures,
) -> None:
    st.subheader("Range of eps", anchor=False)
    said = recommended(entry.summary)
    said = recommended(entry.summary)
    with st.container(key="recommended_eps"):
        if said:
            st.markdown(plain(said))
    _draw(
        figures,
        f"Deviation of the projected gradient over eps, layer {chosen}",
        plots.eps_sweep(sweep, ranges, chosen),
        "eps_chart",
        "Deviation of the projected gradient from the linear range over eps",
    )
    st.caption(EPS)
    st.dataframe(
        ranges,
        hide_index=True,
        key="range_table",
        column_config={
            "layer": "layer (0-based)",
            **{
                c: st.column_config.NumberColumn(c, format="%g")
                for c in ("lowest", "highest", "recommended")
            },
        },
    )


def _detail(layer: int, layers: pd.DataFrame, found: Tables) -> None:
    """The numbers of one layer."""
    own = layers[layers["layer"] == layer].set_index("metric")
    with st.container(horizontal=True):
        for metric, (title, _unit) in plots.METRICS.items():
            if metric in own.index:
                row = own.loc[metric]
                st.metric(
                    title,
                    f"{row['mean']:.3g}",
                    border=True,
                    width=220,
                    delta=f"sd {row['sd']:.2g}" if row["n"] > 1 else "one draw",
                    delta_color="off",
                    delta_arrow="off",
                )
        table = found["propagation"]
        if table is not None:
            grown = table[table["layer"] == layer].nlargest(1, "block")["amplification"]
            if not grown.empty:
                st.metric(
                    "Amplification, last block", f"{grown.iloc[0]:.3g} x", border=True, width=220
                )
