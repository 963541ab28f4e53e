"""Outliers page: where massive activations first appear, by which rule and with which numbers."""

import math

import pandas as pd
import streamlit as st

from pages.parts import history, launch, run_view
from pages.parts.choice import Choice, current, line
from pages.parts.frame import begin
from pages.parts.routes import PAGES
from pages.parts.words import layer_name, plain
from zo_core import export, plots
from zo_core.analysis.outliers import RULES, Verdict, first_outlier_layer
from zo_core.jobs import ScanJob, command_line
from zo_core.tasks.catalog import TASKS

TEXTS = {"sample": "Bundled passages", "prompt": "Own prompt", "task": "A task"}
BOS = {"auto": "as the tokenizer does", "add": "add", "none": "leave out"}
WINDOW = 64  # tokens shown at once


def form(choice: Choice) -> None:
    """The fields of a scan."""
    text = st.segmented_control(
        "Text",
        list(TEXTS),
        format_func=TEXTS.get,
        default="sample",
        key="scan_text",
        required=True,
        persist_state="session",
    )
    values: dict = {"text": text}
    if text == "prompt":
        values["prompt"] = st.text_area(
            "Prompt",
            key="scan_prompt",
            height=100,
            persist_state="session",
            placeholder="Any text: it becomes one sequence",
        )
    elif text == "task":
        with st.container(horizontal=True):
            values["task"] = st.selectbox(
                "Task",
                list(TASKS),
                format_func=lambda t: TASKS[t].title,
                key="scan_task",
                width=260,
                persist_state="session",
            )
            values["data_dir"] = (
                st.text_input(
                    "Data folder",
                    key="scan_data_dir",
                    persist_state="session",
                    placeholder="optional: holds <task>/train.jsonl",
                )
                or None
            )
    with st.container(horizontal=True):
        fields = ScanJob.model_fields
        for name, label in (
            ("sequences", "Sequences"),
            ("max_tokens", "Longest sequence (tokens)"),
            ("batch_size", "Sequences a pass"),
        ):
            if name == "sequences" and text == "prompt":
                continue
            values[name] = st.number_input(
                label,
                value=fields[name].default,
                step=1,
                key=f"scan_{name}",
                width=190,
                persist_state="session",
            )
        values["bos"] = st.selectbox(
            "BOS token",
            list(BOS),
            format_func=BOS.get,
            key="scan_bos",
            width=190,
            persist_state="session",
            help="The first token carries massive activations: BOS changes the answer.",
        )
    launch.launch_row(ScanJob, values | choice.fields(), "Scan", key="start_scan")


@st.cache_data(max_entries=24, show_spinner=False)
def _table(path: str, changed: int) -> pd.DataFrame:
    return pd.read_parquet(path)


def table(entry: history.Entry, name: str) -> pd.DataFrame:
    """A result table of a scan, read once."""
    path = entry.run.result(f"{name}.parquet")
    return _table(str(path), path.stat().st_mtime_ns)


def judge(layers: pd.DataFrame, n_layers: int) -> Verdict:
    """The rule picker, the verdict in one sentence, and all rules side by side."""
    place = st.container(key="verdict")
    with st.container(horizontal=True, vertical_alignment="bottom", key="rule_picker"):
        rule = st.segmented_control(
            "Outlier rule",
            list(RULES),
            format_func=lambda r: RULES[r].title,
            default="emergence",
            key="outlier_rule",
            required=True,
            persist_state="session",
        )
        parameters = {}
        for name, default in RULES[rule].parameters.items():
            value = st.number_input(
                name,
                value=default,
                step=1.0,
                format="%g",
                key=f"rule_{rule}_{name}",
                width=140,
                persist_state="session",
            )
            parameters[name] = default if value is None or not math.isfinite(value) else value
    st.caption(f"{RULES[rule].definition} Source: {RULES[rule].source}.")
    verdicts = {
        name: first_outlier_layer(name, layers, **(parameters if name == rule else {}))
        for name in RULES
    }
    verdict = verdicts[rule]
    with place:
        if verdict.layer is None:
            st.header("No first outlier layer", anchor=False)
        else:
            name = layer_name(verdict.layer, n_layers)
            st.header(f"{name[0].upper()}{name[1:]} is the first outlier layer", anchor=False)
        st.markdown(f"{RULES[rule].title} rule: {plain(verdict.reason)}")
        if verdict.layer is not None:
            fine_tune(verdict.layer, "Fine-tune dominant layer", "fine_tune_dominant", primary=True)
        else:
            st.caption(
                "Fixed thresholds miss many models: try another rule or lower its numbers, or "
                "measure instead on the Sensitivity page."
            )
    with st.expander("What each rule says", key="all_verdicts"):
        st.dataframe(
            pd.DataFrame(
                [
                    {
                        "Rule": RULES[name].title,
                        "Layer (0-based)": "none found" if v.layer is None else str(v.layer),
                        "Why": v.reason,
                        "Parameters": ", ".join(f"{k} = {x:g}" for k, x in v.parameters.items()),
                    }
                    for name, v in verdicts.items()
                ]
            ),
            hide_index=True,
            key="verdict_table",
            row_height=56,
            column_config={"Why": st.column_config.TextColumn(width="large")},
        )
    return verdict


def fine_tune(layer: int, label: str, key: str, primary: bool = False) -> None:
    """A button that opens the fine-tune page on one layer."""
    if st.button(
        label, key=key, type="primary" if primary else "secondary", icon=":material/trending_down:"
    ):
        st.switch_page(PAGES["fine_tune"], query_params={"scope": f"layer:{layer}"})


def clicked(chart: str) -> None:
    """Select the layer of the clicked cell."""
    points = st.session_state[chart].selection.points
    if points:
        st.session_state["outlier_layer"] = int(points[0]["customdata"][0])


def detail(
    layer: int, n_layers: int, row: pd.Series, channels: pd.DataFrame, tokens: pd.DataFrame
) -> None:
    """The largest magnitudes of one layer, with their tokens and channels."""
    with st.container(horizontal=True):
        for r in (1, 2, 3):
            st.metric(
                f"top-{r}",
                plots.number(row[f"top{r}"]),
                border=True,
                width=210,
                delta=f"{plots.visible(row[f'top{r}_token'])[:14]} · "
                f"channel {row[f'top{r}_channel']}",
                delta_color="off",
                delta_arrow="off",
            )
        ratio = row["top1"] / row["median"] if row["median"] else math.nan
        st.metric(
            "median",
            plots.number(row["median"]),
            border=True,
            width=210,
            delta=f"top-1 is {plots.number(ratio)} x",
            delta_color="off",
            delta_arrow="off",
        )
    magnitude = st.column_config.NumberColumn("magnitude", format="%.4g")
    left, right = st.columns(2)
    with left:
        st.markdown("Top tokens")
        top = tokens[tokens["layer"] == layer].nlargest(10, "magnitude")
        st.dataframe(
            top.assign(token=top["token"].map(plots.visible))[
                ["token", "sequence", "position", "channel", "magnitude"]
            ],
            hide_index=True,
            key="top_tokens",
            column_config={"magnitude": magnitude},
        )
    with right:
        st.markdown("Top channels")
        top = channels[channels["layer"] == layer].nlargest(10, "magnitude")
        st.dataframe(
            top[["channel", "magnitude"]],
            hide_index=True,
            key="top_channels",
            column_config={"magnitude": magnitude},
        )


def choose_sequence(tokens: pd.DataFrame) -> tuple[int, int]:
    """Which sequence, and from which position on; asked only when there is a choice."""
    sequences = sorted(int(s) for s in tokens["sequence"].unique())
    with st.container(horizontal=True):
        sequence = sequences[0]
        if len(sequences) > 1:
            sequence = st.selectbox("Sequence", sequences, key="token_sequence", width=140)
        length = int(tokens.loc[tokens["sequence"] == sequence, "position"].max()) + 1
        start = 0
        if length > WINDOW:
            start = st.select_slider(
                "Positions",
                list(range(0, length, WINDOW)),
                key=f"token_start_{length}",
                width=260,
                format_func=lambda s: f"{s} to {min(s + WINDOW, length) - 1}",
            )
    return sequence, start


def downloads(
    entry: history.Entry, tables: dict[str, pd.DataFrame], verdict: Verdict, figures: list
) -> None:
    """CSV of every table and one HTML report."""
    with st.container(horizontal=True, key="scan_downloads"):
        for name, frame in tables.items():
            st.download_button(
                f"{name}.csv",
                lambda frame=frame: export.csv_bytes(frame),
                f"{entry.run_id}-{name}.csv",
                "text/csv",
                key=f"download_{name}",
                icon=":material/download:",
                on_click="ignore",
            )
        st.download_button(
            "Figures (HTML)",
            lambda: export.html_bytes(
                f"Activation scan of {entry.job.model}",
                figures,
                [verdict.reason, f"Run {entry.run_id}. Layers are 0-based."],
                command_line(entry.job),
            ),
            f"{entry.run_id}.html",
            "text/html",
            key="download_html",
            icon=":material/download:",
            on_click="ignore",
        )


def results(entry: history.Entry) -> None:
    """Everything a finished scan shows."""
    try:
        layers, channels, tokens = (table(entry, n) for n in ("layers", "channels", "tokens"))
    except (OSError, ValueError) as error:
        st.error(f"The results of this scan cannot be read: {plain(str(error))}")
        return
    blocks = [int(k) for k in layers["layer"] if k >= 0]
    n_layers = len(blocks)
    verdict = judge(layers, n_layers)
    st.subheader("Profile by layer", anchor=False)
    profile = plots.profile(layers, verdict.layer)
    st.plotly_chart(
        profile, key="profile_chart", alt="Top-1 to top-3 and median magnitude by layer"
    )

    # A click lands in this key before the widget is drawn further down.
    default = verdict.layer if verdict.layer is not None else blocks[0]
    if (
        st.session_state.get("outlier_layer") not in blocks
        or st.session_state.get("outlier_layer_of") != entry.run_id
    ):
        st.session_state["outlier_layer"] = default
    st.session_state["outlier_layer_of"] = entry.run_id
    selected = st.session_state["outlier_layer"]
    st.subheader("Layer by channel", anchor=False)
    by_channel = plots.channel_heatmap(channels, verdict.layer, selected)
    st.plotly_chart(
        by_channel,
        key="channel_chart",
        on_select=lambda: clicked("channel_chart"),
        selection_mode="points",
        alt="Largest magnitude by layer and channel",
    )
    st.subheader("Layer by token", anchor=False)
    sequence, start = choose_sequence(tokens)
    by_token = plots.token_heatmap(tokens, sequence, start, WINDOW, verdict.layer, selected)
    st.plotly_chart(
        by_token,
        key="token_chart",
        on_select=lambda: clicked("token_chart"),
        selection_mode="points",
        alt="Largest magnitude by layer and token",
    )
    st.caption("Click a cell to see its layer below, or choose the layer there.")

    st.subheader("Layer detail", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", key="layer_detail"):
        layer = st.selectbox(
            "Layer",
            blocks,
            key="outlier_layer",
            width=260,
            format_func=lambda k: layer_name(k, n_layers),
        )
        fine_tune(layer, f"Fine-tune layer {layer}", "fine_tune_selected")
    detail(layer, n_layers, layers[layers["layer"] == layer].iloc[0], channels, tokens)

    st.subheader("Export", anchor=False)
    figures = [("Profile", profile), ("Layer by channel", by_channel), ("Layer by token", by_token)]
    downloads(entry, {"layers": layers, "channels": channels, "tokens": tokens}, verdict, figures)


def show(entry: history.Entry) -> None:
    """A scan, live or ended."""
    if entry.status.state == "done":
        results(entry)


begin(
    "Outliers",
    "A scan records the largest activations after every decoder layer. The layer where massive "
    "activations first appear is the one to fine-tune first.",
)
choice = current()
line(choice)
shown = run_view.pick("scan", choice)
with (
    st.container(key="new_scan"),
    st.expander(
        "New scan", expanded=shown is None, icon=":material/add:", key=f"new_scan_{shown is None}"
    ),
):
    form(choice)
if shown is None:
    if "run" not in st.query_params:
        st.info(
            "No scan of this model yet. Press **Scan** above: on the bundled model it takes a few "
            "seconds.",
            icon=":material/arrow_upward:",
        )
else:
    run_view.follow(shown, show, every=0.5)
