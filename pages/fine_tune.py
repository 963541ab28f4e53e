"""Fine-tune page: zeroth-order fine-tuning of one layer or the whole model, live."""

import re

import streamlit as st

from pages.parts import curve, exports, history, launch, run_view, tune_facts
from pages.parts.choice import Choice, current, describe, line
from pages.parts.device_memory import tune_line
from pages.parts.forms import data_folder, missing_layers, task_picker
from pages.parts.frame import begin
from pages.parts.live_chart import live_chart
from pages.parts.own_task import own_fields
from pages.parts.preview import preview
from pages.parts.tune_fields import advanced, integers, numbered_layers
from pages.parts.words import layer_name
from zo_core import export, plots, runs, scope_spec
from zo_core.jobs import TuneJob, command_line, recommended_lr
from zo_core.tasks.catalog import METRIC_NAMES, OWN

SCOPES = {
    "auto": "Dominant layer (auto)",
    "layer": "One layer",
    "full": "All layers",
    "other": "Other",
}
FIELDS = TuneJob.model_fields
ONE_LAYER = re.compile(r"^layer:(\d{1,5})$")


def adopt_link() -> None:
    """Fill in the scope that a link or a button of another page carries, once."""
    scope = st.query_params.get("scope")
    if scope is None:
        return
    del st.query_params["scope"]
    layer = ONE_LAYER.match(scope)
    if layer:
        st.session_state["tune_scope"] = "layer"
        st.session_state["tune_layer"] = int(layer[1])
    elif scope in ("full", "layer:auto"):
        st.session_state["tune_scope"] = "full" if scope == "full" else "auto"
    else:
        st.session_state["tune_scope"] = "other"
        st.session_state["tune_scope_text"] = scope[:200]
    st.session_state["tune_form_open"] = True


def pick_scope(choice: Choice) -> str:
    """What is tuned, with what the latest scan says about it."""
    info, _ = describe(choice)
    found, scan = history.outlier_layer(choice)
    n_layers = info.n_layers if info else None
    st.session_state.setdefault("tune_scope", "auto")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        kind = st.segmented_control(
            "Scope",
            list(SCOPES),
            format_func=SCOPES.get,
            key="tune_scope",
            required=True,
            persist_state="session",
        )
        if kind == "layer":
            st.session_state.setdefault("tune_layer", found or 0)
            layer = st.number_input(
                "Layer (0-based)", step=1, key="tune_layer", width=160, persist_state="session"
            )
        if kind == "other":
            st.session_state.setdefault("tune_scope_text", "attention:auto")
            text = st.text_input(
                "Scope",
                key="tune_scope_text",
                width=260,
                max_chars=200,
                persist_state="session",
                help="\n".join(f"* `{f.syntax}`: {f.meaning}" for f in scope_spec.FORMS.values()),
            )
    if kind == "other":
        meaning = next(
            (f.meaning for f in scope_spec.FORMS.values() if f.pattern.fullmatch(text.strip())), ""
        )
        st.caption(f"{meaning[:1].upper()}{meaning[1:]}." if meaning else scope_spec.SYNTAX)
        return text.strip()
    if kind == "full":
        st.caption("Every parameter of the model is perturbed and updated.")
        return "full"
    if kind == "layer":
        if layer is None:
            return "layer:"
        if n_layers and 0 <= layer < n_layers:
            mark = ", the first outlier layer of the latest scan" if layer == found else ""
            st.caption(f"{layer_name(layer, n_layers).capitalize()}{mark}.")
        return f"layer:{layer}"
    if found is not None:
        name = layer_name(found, n_layers or found + 1)
        st.caption(f"The latest scan of this model names **{name}**.")
    elif scan is not None:
        st.caption("The latest scan names no first outlier layer: choose a layer yourself.")
    else:
        st.caption("The run scans the model first and tunes the first outlier layer.")
    return "layer:auto"


def form(choice: Choice) -> None:
    """The fields of a tuning run: the usual ones, then the rest."""
    scope = pick_scope(choice)
    values: dict = {"scope": scope}
    optimizer = st.session_state.get("tune_optimizer", FIELDS["optimizer"].default)
    with st.container(horizontal=True):
        values["task"] = task_picker("tune")
        integers(values, {"steps": "Steps", "batch_size": "Batch size", "seed": "Seed"})
        values["lr"] = st.number_input(
            "Learning rate (empty: recommended)",
            value=None,
            step=1e-6,
            format="%g",
            key="tune_lr",
            width=250,
            placeholder=f"{recommended_lr(choice.model, scope, optimizer):g}",
            persist_state="session",
        )
        values["eps"] = st.number_input(
            "eps",
            value=FIELDS["eps"].default,
            step=1e-4,
            format="%g",
            key="tune_eps",
            width=110,
            help="Perturbation scale",
            persist_state="session",
        )
    with st.expander("More settings", key="tune_more"), st.container(horizontal=True):
        integers(
            values,
            {
                "eval_every": "Dev evaluation every (steps)",
                "checkpoint_every": "Checkpoint every (steps)",
                "train_examples": "Training rows",
                "dev_examples": "Dev rows (empty: the task's)",
                "eval_examples": "Validation rows",
            },
            width=190,
        )
        values["weight_decay"] = st.number_input(
            "Weight decay",
            value=0.0,
            step=0.01,
            format="%g",
            key="tune_weight_decay",
            width=150,
            persist_state="session",
        )
        values["path"] = st.selectbox(
            "Forward path",
            ["auto", "fast", "reference"],
            key="tune_path",
            width=170,
            help="fast: cached frozen prefix; reference: as the papers do",
            persist_state="session",
        )
        values["data_dir"] = data_folder("tune")
    with st.expander("Advanced", key="tune_advanced"):
        advanced(values)
    if values["task"] == OWN:
        values |= own_fields("tune")
    preview("tune", values, choice)
    tune_line(choice, values)
    launch.launch_row(
        TuneJob,
        values | choice.fields(),
        "Fine-tune",
        key="start_tune",
        problem=missing_layers(choice, numbered_layers(scope)),
    )


def show(entry: history.Entry) -> None:
    """A tuning run, live or ended."""
    metrics = curve.curve(entry.run)
    begun = entry.summary.get("before") or entry.status.details.get("before") or metrics.evals
    if len(metrics) or entry.status.live or (begun and entry.status.state != "failed"):
        tune_facts.facts(entry, metrics)
    if not len(metrics):
        if entry.status.live:
            st.caption("The curve appears with the first step.")
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        axis = st.segmented_control(
            "X-axis",
            list(plots.AXES),
            format_func=plots.AXES.get,
            default="step",
            key="curve_axis",
            required=True,
            persist_state="session",
        )
        span = st.select_slider(
            "Smoothing (steps)",
            [1, 5, 10, 20, 50, 100, 200, 500],
            value=50,
            key="curve_span",
            width=240,
            persist_state="session",
        )
    figure = plots.loss_curve(
        metrics.steps,
        metrics.evaluations,
        axis,
        span,
        f"{entry.run_id}-{axis}",
        entry.metric,
        metrics.dev_evaluations,
        metrics.best_step,
    )
    live_chart(figure, key="loss_chart")
    # What the downloads below, which are not redrawn with the chart, read at the click.
    st.session_state.setdefault("curve_view", {}).update(axis=axis, span=span)


def report(run: runs.Run, view: dict) -> bytes:
    """The figure of a run as it is now, in an HTML page; called at the click."""
    entry, metrics = history.read(run), curve.Curve()
    metrics.advance(run)
    figure = plots.loss_curve(
        metrics.steps,
        metrics.evaluations,
        **view,
        metric=entry.metric,
        dev=metrics.dev_evaluations,
        best=metrics.best_step,
    )
    return export.html_bytes(
        f"Fine-tuning of {entry.job.model}",
        [(f"Loss and {METRIC_NAMES[entry.metric]}", figure)],
        [f"Run {run.run_id}, scope {entry.scope}. {entry.key_result}"],
        command_line(entry.job),
    )


def metrics_csv(run: runs.Run) -> bytes:
    """All records of a run as CSV."""
    return export.csv_bytes(export.metrics_table(run.read_metrics()[0]))


@st.cache_data(max_entries=8, show_spinner=False)
def kept_csv(run_id: str, size: int) -> bytes:  # noqa: ARG001 - a resumed run has more
    """The same of a run that has ended; ``size`` is that of the records in bytes."""
    return metrics_csv(runs.get(run_id))


def downloads(entry: history.Entry) -> None:
    """Metrics, weights and figure: outside the part that is redrawn each second.

    A redraw replaces the address of a download, and a click just before it would find nothing.
    """
    run, live = entry.run, entry.status.live
    if not live and not len(curve.curve(run)):
        return
    view = st.session_state.setdefault("curve_view", {})
    with st.container(horizontal=True, key="tune_downloads"):
        st.download_button(
            "metrics.csv",
            # Made at the click only while it grows: a click that falls into the rerun at the end of
            # a run would be lost, and the button would wait for ever.
            (lambda: metrics_csv(run)) if live else kept_csv(run.run_id, curve.curve(run).offset),
            f"{run.run_id}-metrics.csv",
            "text/csv",
            key="download_metrics",
            icon=":material/download:",
            on_click="ignore",
        )
        exports.buttons(entry)
        st.download_button(
            "Figure (HTML)",
            lambda: report(run, view),
            f"{run.run_id}.html",
            "text/html",
            key="download_html",
            icon=":material/download:",
            on_click="ignore",
        )
    exports.folders(entry)


begin(
    "Fine-tune",
    "Zeroth-order optimization estimates the gradient from two forward passes a step, without "
    "backpropagation. The Dominant-Layer paper reports that tuning one layer, the first outlier "
    "layer, matches tuning all of them and is faster: see whether it does on your model.",
)
adopt_link()
choice = current()
line(choice)
shown = run_view.pick("tune", choice)
opened = shown is None or st.session_state.pop("tune_form_open", False)
with (
    st.container(key="new_tune"),
    st.expander("New run", expanded=opened, icon=":material/add:", key=f"new_tune_{opened}"),
):
    form(choice)
if shown is None:
    if "run" not in st.query_params:
        st.info(
            "No fine-tuning run of this model yet. The defaults are good: press **Fine-tune** "
            "above.",
            icon=":material/arrow_upward:",
        )
else:
    run_view.follow(shown, show)
    downloads(shown)
