"""What a finished probe shows below its chart: distribution, propagation, place, range of eps."""

import pandas as pd
import streamlit as st

from pages.parts import history, layer_pick, result_files
from zo_core import plots

TABLES = (
    "draws",
    "layers",
    "propagation",
    "gradients",
    "gradients_by_batch",
    "scalings",
    "scaled_layers",
    "ablation",
    "sweep",
    "linear_range",
)
LAYER = "probe_layer"
Figures = list[tuple[str, object]]


def analyses(
    entry: history.Entry, layers: pd.DataFrame, first: int | None, n_layers: int
) -> Figures:
    """Draw every analysis that the probe holds, with one chosen layer; gives the figures."""
    found = {name: result_files.table(entry, name) for name in TABLES}
    probed = sorted(int(k) for k in layers["layer"].unique())
    most = entry.summary.get("most_sensitive_layer")
    chosen = layer_pick.restore(LAYER, entry.run_id, probed, most if most in probed else probed[0])
    figures: Figures = []
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
    figures.append((title, figure))


def _distribution(
    found: dict[str, pd.DataFrame | None], first: int | None, chosen: int, figures: Figures
) -> None:
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
        st.caption(
            "Sign agreement: share of pairs of batches in which g has the same sign for the same "
            "z; 50 % is chance. SNR: what the batches agree on over what they differ by."
        )
    else:
        st.caption(
            "One batch: choose two or more batches to see whether another batch would give the "
            "same sign."
        )


def _propagation(
    found: dict[str, pd.DataFrame | None], first: int | None, chosen: int, figures: Figures
) -> None:
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
    st.caption(
        "Relative change of a block's output, |change| / |output| by token, mean over tokens, "
        "draws and signs. Amplification: that over the change at the perturbed layer's own output."
    )


def _place(
    entry: history.Entry,
    table: pd.DataFrame,
    first: int | None,
    chosen: int,
    figures: Figures,
) -> None:
    st.subheader("Place or sensitivity?", anchor=False)
    target = entry.summary.get("equalised_own_change")
    lead = table.loc[table["plain_relative"].idxmax()]
    after = table.loc[table["equalised_relative"].idxmax()]
    st.markdown(
        f"With one eps, layer {lead['layer']:.0f} moves the loss most, "
        f"{lead['plain_relative']:.2g} times as much as the median layer; with every layer's own "
        f"output changed alike{f' (by {target:.3g})' if target else ''} that layer has "
        f"{lead['equalised_relative']:.2g} times, and layer {after['layer']:.0f} leads with "
        f"{after['equalised_relative']:.2g} times."
    )
    _draw(
        figures,
        "Loss shift, plain and equalised",
        plots.ablation(table, first, chosen),
        "ablation_chart",
        "Loss shift of every layer with one eps and with equal change at its own output",
    )
    rho = entry.summary.get("place_effect")
    note = (
        "Where the lines differ, a layer is felt because its own output reacts; what stays of a "
        "lead after equalising is due to its place: the way from its output to the loss."
    )
    if rho is not None:
        note += f" Rank correlation of layer and equalised loss shift: {rho:+.2f}"
        note += " (−1: each earlier layer is felt more)."
    st.caption(note)


def _range(
    entry: history.Entry,
    sweep: pd.DataFrame,
    ranges: pd.DataFrame,
    chosen: int,
    figures: Figures,
) -> None:
    st.subheader("Range of eps", anchor=False)
    eps, reason = (entry.summary.get(f"recommended_eps{end}") for end in ("", "_reason"))
    with st.container(key="recommended_eps"):
        if eps is not None:
            st.markdown(f"Recommended eps: **{eps:g}**, {reason}.")
        elif reason:
            st.markdown(f"No eps can be recommended for all layers: {reason}.")
    _draw(
        figures,
        f"Deviation of the projected gradient over eps, layer {chosen}",
        plots.eps_sweep(sweep, ranges, chosen),
        "eps_chart",
        "Deviation of the projected gradient from the linear range over eps",
    )
    st.caption(
        "How far the projected gradients of the same draws are from those at the steadiest eps. "
        "Too large an eps sees curvature, too small a one rounding. The linear range is within "
        "10 %; its largest eps is recommended."
    )
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


def _detail(layer: int, layers: pd.DataFrame, found: dict[str, pd.DataFrame | None]) -> None:
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
