"""Mechanism page: who writes a massive activation, who removes it, and what it is for."""

import pandas as pd
import streamlit as st

from pages.parts import history, launch, layer_pick, run_view, tables
from pages.parts.choice import Choice, current, line
from pages.parts.frame import begin
from pages.parts.result_exports import exports
from pages.parts.text_fields import text_fields
from pages.parts.words import layer_name, plain
from zo_core import plots
from zo_core.analysis.outliers import RULES
from zo_core.jobs import MechanismJob
from zo_core.reports.mechanism import (
    PARTS,
    about_interventions,
    about_sinks,
    not_massive,
    story,
)

TABLES = {
    "sites": "each massive channel's peak, writer and remover",
    "contributions": "the residual stream there",
    "neurons": "what writes and removes it",
    "sinks": "attention on it by layer and head",
    "interventions": "the loss without it by layer",
}
"""What the tables of a mechanism run hold."""
LAYER = "mechanism_layer"


def form(choice: Choice) -> None:
    """The fields of a mechanism job."""
    values = text_fields("mechanism", MechanismJob)
    with st.container(horizontal=True):
        values["rule"] = st.selectbox(
            "Outlier rule",
            list(RULES),
            format_func=lambda r: RULES[r].title,
            key="mechanism_rule",
            width=220,
            persist_state="session",
            help="Says whether the model has massive activations on these texts at all",
        )
        values["channels"] = st.number_input(
            "Channels, at most",
            value=MechanismJob.model_fields["channels"].default,
            step=1,
            key="mechanism_channels",
            width=190,
            persist_state="session",
            help="A further channel is followed if its peak is at least a quarter of the largest",
        )
    launch.launch_row(MechanismJob, values | choice.fields(), "Look inside", key="start_mechanism")


def told(site: pd.Series, summary: dict, n_layers: int) -> None:
    """Who writes the massive activation, and what happens to it then."""
    named = layer_name(int(site["writer_layer"]), n_layers)
    st.header(f"The {PARTS[site['writer']]} of {named} writes it", anchor=False)
    st.markdown(plain(story(site)))
    caveat = not_massive(summary)
    if caveat:
        st.warning(plain(caveat), icon=":material/info:")


def choose_site(sites: pd.DataFrame) -> int:
    """Which massive channel; asked only when there is a choice."""
    if len(sites) == 1:
        return 0
    by_number = sites.set_index("site")
    return st.segmented_control(
        "Massive channel",
        by_number.index.tolist(),
        format_func=lambda n: (
            f"{by_number.at[n, 'channel']} (peak {plots.number(by_number.at[n, 'value'])})"
        ),
        default=0,
        key="mechanism_site",
        required=True,
    )


def neuron_figures(entry: history.Entry, site: pd.Series, neurons: pd.DataFrame) -> dict:
    """Bars of the writer's and the remover's neurons, side by side."""
    figures = {}
    roles = [r for r in ("writer", "remover") if (neurons["role"] == r).any()]
    if not roles:
        reason = entry.summary.get("neurons") or "no MLP wrote or removed it"
        st.caption(plain(f"Neurons: {reason}."))
        return figures
    for column, role in zip(st.columns(len(roles)), roles, strict=True):
        own = neurons[neurons["role"] == role]
        layer = int(own["layer"].iloc[0])
        with column:
            doing = "write" if role == "writer" else "remove"
            st.markdown(f"Neurons of layer {layer} that {doing} it")
            figure = plots.neurons(own)
            st.plotly_chart(figure, key=f"neurons_{role}", alt=f"Neurons of the {role}")
            figures[f"Neurons of the {role}, layer {layer}"] = figure
    st.caption(
        f"Row {site['channel']} of the down-projection times its input at this token, by input "
        "neuron; percentages are of the whole sum."
    )
    return figures


def results(entry: history.Entry) -> None:
    """Everything a mechanism run has found so far."""
    try:
        found = tables.tables(entry, TABLES)
    except (OSError, ValueError) as error:
        st.error(f"The results of this run cannot be read: {plain(str(error))}")
        return
    sites, contributions, neurons = (found[n] for n in ("sites", "contributions", "neurons"))
    if sites is None or contributions is None or neurons is None:
        if entry.status.live:
            st.caption("The first figure appears once the residual stream has been followed.")
        return
    n_layers = int(contributions["layer"].max()) + 1
    layers = list(range(n_layers))
    first = entry.summary.get("first_outlier_layer")
    with st.container(key="mechanism_story"):
        number = choose_site(sites)
        site = sites[sites["site"] == number].iloc[0]
        told(site, entry.summary, n_layers)
    chosen = layer_pick.restore(LAYER, entry.run_id, layers, int(site["writer_layer"]))
    figures: dict[str, object] = {}

    def draw(title: str, figure: object, key: str, alt: str) -> None:
        st.plotly_chart(
            figure,
            key=key,
            alt=alt,
            on_select=layer_pick.clicked(key, LAYER),
            selection_mode="points",
        )
        figures[title] = figure

    st.subheader("Who writes it, who removes it", anchor=False)
    own = contributions[contributions["site"] == number]
    draw(
        "Residual stream at the massive activation",
        plots.contributions(own, chosen),
        "contribution_chart",
        "What attention and MLP of every layer add to the massive channel",
    )
    figures |= neuron_figures(entry, site, neurons[neurons["site"] == number])

    st.subheader("What attends to it", anchor=False)
    sinks = found["sinks"]
    if sinks is not None and not sinks.empty:
        draw(
            "Attention on massive tokens",
            plots.sinks(sinks, first, chosen),
            "sink_chart",
            "Share of attention on the massive tokens by layer and head",
        )
        st.caption(about_sinks(sinks))
    elif sinks is not None:
        reason = entry.summary.get("sinks") or "no attention weights were found"
        st.caption(plain(f"No attention sinks: {reason}."))
    elif entry.status.live:
        st.caption("Attention weights follow.")

    st.subheader("What it is for", anchor=False)
    table = found["interventions"]
    if table is not None:
        draw(
            "Interventions",
            plots.interventions(table, first, chosen),
            "intervention_chart",
            "Change of the loss when massive activations are set at one layer",
        )
        st.caption(about_interventions(entry.summary))
    elif entry.status.live:
        st.caption("Interventions follow, layer by layer.")

    st.subheader("Layer detail", anchor=False)
    with st.container(key="mechanism_detail"):
        layer = layer_pick.choose(LAYER, layers, n_layers)
        detail(layer, own, sinks, table)
    if not entry.status.live:
        note = "What the columns are: docs/mechanism.md."
        exports(entry, TABLES, found, figures, note)


def detail(
    layer: int, own: pd.DataFrame, sinks: pd.DataFrame | None, table: pd.DataFrame | None
) -> None:
    """The numbers of one layer."""
    row = own[own["layer"] == layer].iloc[0]
    with st.container(horizontal=True):
        for name, label in (
            ("before", "block input"),
            ("attention", "attention adds"),
            ("mlp", "MLP adds"),
            ("after", "block output"),
        ):
            st.metric(label, plots.number(row[name]), border=True, width=170)
        if sinks is not None and (sinks["layer"] == layer).any():
            most = sinks[sinks["layer"] == layer]["share"]
            st.metric(
                "attention on it, largest head",
                f"{most.max():.1%}",
                border=True,
                width=220,
                delta=f"{most.mean():.1%} mean over heads",
                delta_color="off",
                delta_arrow="off",
            )
        if table is not None:
            zero = table[(table["layer"] == layer) & (table["intervention"] == "zero")]["change"]
            if not zero.empty:
                change = f"{zero.iloc[0]:+.3g} nats"
                st.metric("set to zero", change, border=True, width=190)


begin(
    "Mechanism",
    "Follows a massive activation through the model: which part of which layer writes it into the "
    "residual stream, which neurons do it, where it is removed, how much attention goes to its "
    "token, and what the loss does without it.",
)
choice = current()
line(choice)
shown = run_view.pick("mechanism", choice)
with (
    st.container(key="new_mechanism"),
    st.expander(
        "New run",
        expanded=shown is None,
        icon=":material/add:",
        key=f"new_mechanism_{shown is None}",
    ),
):
    form(choice)
if shown is None:
    if "run" not in st.query_params:
        st.info(
            "Nobody has looked inside this model yet. Press **Look inside** above: the bundled "
            "model takes less than a minute.",
            icon=":material/arrow_upward:",
        )
else:
    run_view.follow(shown, results)
