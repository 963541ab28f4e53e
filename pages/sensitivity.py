"""Sensitivity page: how much the loss moves when one layer at a time is perturbed."""

import pandas as pd
import streamlit as st

from pages.parts import history, launch, probe_results, run_view
from pages.parts.choice import Choice, current, describe, line
from pages.parts.forms import data_folder, missing_layers, parse_layers, task_picker
from pages.parts.frame import begin
from pages.parts.links import fine_tune
from pages.parts.live_chart import live_chart
from pages.parts.own_task import own_fields
from pages.parts.preview import preview
from pages.parts.result_exports import exports
from pages.parts.tables import tables
from pages.parts.words import layer_name, plain
from zo_core import plots
from zo_core.jobs import ProbeJob
from zo_core.reports.probe import SCALINGS, WHISKERS, overlaps
from zo_core.tasks.catalog import OWN


def form(choice: Choice) -> None:
    """The fields of a probe."""
    fields = ProbeJob.model_fields
    with st.container(horizontal=True):
        values: dict = {"task": task_picker("probe")}
        for name, label, text in (
            ("draws", "Draws of z a layer", "More draws, narrower intervals"),
            ("batch_size", "Batch size", None),
            ("seed", "Seed", None),
        ):
            values[name] = st.number_input(
                label,
                value=fields[name].default,
                step=1,
                key=f"probe_{name}",
                width=150,
                help=text,
                persist_state="session",
            )
        values["eps"] = st.number_input(
            "eps",
            value=fields["eps"].default,
            step=1e-4,
            format="%g",
            key="probe_eps",
            width=150,
            help="Perturbation scale",
            persist_state="session",
        )
        layers = st.text_input(
            "Layers",
            key="probe_layers",
            placeholder="all, or 0-based: 0,3,8-11",
            width=220,
            persist_state="session",
        )
        values["noise"] = st.selectbox(
            "Distribution of z",
            ["gaussian", "rademacher"],
            key="probe_noise",
            width=170,
            persist_state="session",
        )
        values["data_dir"] = data_folder("probe")
    values["layers"] = parse_layers(layers)
    further(values)
    if values["task"] == OWN:
        values |= own_fields("probe")
    preview("probe", values, choice)
    launch.launch_row(
        ProbeJob,
        values | choice.fields(),
        "Probe",
        key="start_probe",
        problem=missing_layers(choice, values["layers"] or []),
    )


def further(values: dict) -> None:
    """The analyses that cost more forward passes."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="probe_further"):
        values["batches"] = st.number_input(
            "Batches",
            value=ProbeJob.model_fields["batches"].default,
            step=1,
            key="probe_batches",
            width=150,
            help="For the same z: sign agreement and signal-to-noise ratio need at least two",
            persist_state="session",
        )
        values["scalings"] = st.pills(
            "Also with eps scaled",
            [s for s in SCALINGS if s != "none"],
            format_func=SCALINGS.get,
            selection_mode="multi",
            key="probe_scalings",
            persist_state="session",
            help="Fair perturbations: of the same norm, of the same share of the weights, or with "
            "the same change of each layer's own output. Each costs as much as the probe itself.",
        )
        values["eps_sweep"] = st.text_input(
            "eps sweep",
            key="probe_eps_sweep",
            placeholder="optional: 1e-5,1e-4,3e-4,1e-3,3e-3,1e-2",
            width=330,
            persist_state="session",
            help="Finds the range in which the projected gradient does not depend on eps",
        )


def layer_count(entry: history.Entry) -> int | None:
    """How many layers the probed model has."""
    info, _ = describe(Choice(entry.job.model, entry.job.revision))
    return entry.summary.get("n_layers") or (info.n_layers if info else None)


def headline(layers: pd.DataFrame, most: int, n_layers: int) -> None:
    """Which layer has the largest mean, and how sure that is."""
    probed = layers["layer"].nunique()
    name = layer_name(most, n_layers)
    name = f"{name[0].upper()}{name[1:]}"
    sure = overlaps(layers, most)
    if probed == 1:
        st.header(f"{name} is the only probed layer", anchor=False)
    elif probed == n_layers and plots.overlapping(layers, most, "abs_projected_gradient") == []:
        st.header(f"{name} is the most sensitive", anchor=False)
        st.markdown(f"It has the largest mean |g| of all {n_layers} layers. {sure}")
    else:
        st.header(f"{name} has the largest mean |g| of the {probed} probed layers", anchor=False)
        st.markdown(sure)


def show(entry: history.Entry) -> None:
    """A probe, growing layer by layer while it is live."""
    try:
        found = tables(entry, ("layers", "scaled_layers"))
    except (OSError, ValueError) as error:
        st.error(f"The results of this probe cannot be read: {plain(str(error))}")
        return
    layers, scaled = found["layers"], found["scaled_layers"]
    if layers is None:
        if entry.status.live:
            st.caption("The chart appears with the first finished layer.")
        return
    job = entry.job
    first, scan = history.outlier_layer(Choice(job.model, job.revision))
    n_layers = layer_count(entry) or int(layers["layer"].max()) + 1
    most = entry.summary.get("most_sensitive_layer")
    if most is not None:
        headline(layers, most, n_layers)
        if first is not None:
            st.markdown(
                f"Layer {most} is also the first outlier layer of the latest scan."
                if first == most
                else f"The first outlier layer of the latest scan is another: layer {first}."
            )
        with st.container(horizontal=True):
            for layer in dict.fromkeys(k for k in (most, first) if k is not None):
                fine_tune(layer, f"Fine-tune layer {layer}", f"fine_tune_{layer}", layer == most)
    measured = [m for m in plots.METRICS if m in set(layers["metric"])]
    metric = st.segmented_control(
        "Metric",
        measured,
        format_func=lambda m: plots.METRICS[m][0],
        default=measured[0],
        key="probe_metric",
        required=True,
        persist_state="session",
    )
    scaling, shown = perturbation(layers, scaled)
    figure = plots.sensitivity(shown, metric, first, job.layers or range(n_layers))
    figure.update_layout(uirevision=f"{entry.run_id}-{metric}")
    live_chart(figure, key="probe_chart")
    note = WHISKERS
    if scan is None:
        note += " Scan this model on the Outliers page to see its first outlier layer marked here."
    st.caption(note)
    of_metric = shown[shown["metric"] == metric].sort_values("layer")
    numbers = {c: st.column_config.NumberColumn(c, format="%.4g") for c in ("mean", "sd", "se")}
    st.dataframe(
        of_metric[["layer", "mean", "sd", "se", "n"]],
        hide_index=True,
        key="probe_table",
        column_config={"layer": "layer (0-based)"} | numbers,
    )
    if entry.status.live:
        return
    title = f"Sensitivity by layer, {metric.replace('_', ' ')}"
    figures = {title if scaling == "none" else f"{title}, {SCALINGS[scaling]}": figure}
    try:
        found |= tables(entry, probe_results.TABLES)
        figures |= probe_results.analyses(entry, found, first, n_layers)
    except (OSError, ValueError, KeyError) as error:
        st.error(f"Some results of this probe cannot be read: {plain(str(error))}")
    note = "draws is the tidy table of all measurements. What the columns are: docs/sensitivity.md."
    exports(entry, probe_results.TABLES, found, figures, note)


def perturbation(layers: pd.DataFrame, scaled: pd.DataFrame | None) -> tuple[str, pd.DataFrame]:
    """The chosen perturbation, one eps for all or a fair one that was measured, and its table."""
    if scaled is None:
        return "none", layers
    there = [s for s in SCALINGS if s == "none" or s in set(scaled["scaling"])]
    chosen = st.segmented_control(
        "Perturbation",
        there,
        format_func=SCALINGS.get,
        default="none",
        key="probe_scaling",
        required=True,
        help="What eps is in each layer; docs/sensitivity.md has the formulas",
    )
    if chosen == "none":
        return chosen, layers
    return chosen, scaled[scaled["scaling"] == chosen]


begin(
    "Sensitivity",
    "A probe adds ±eps z to one layer at a time and measures the projected gradient, the shift of "
    "the loss and how far the model's output moves.",
)
choice = current()
line(choice)
shown = run_view.pick("probe", choice)
with (
    st.container(key="new_probe"),
    st.expander(
        "New probe", expanded=shown is None, icon=":material/add:", key=f"new_probe_{shown is None}"
    ),
):
    form(choice)
if shown is None:
    if "run" not in st.query_params:
        st.info(
            "No probe of this model yet. Press **Probe** above: all layers of the bundled model "
            "take less than a minute.",
            icon=":material/arrow_upward:",
        )
else:
    run_view.follow(shown, show)
