"""Outliers page: where massive activations first appear, by which rule and with which numbers."""

import math

import pandas as pd
import streamlit as st

from pages.parts import history, launch, run_view
from pages.parts.choice import Choice, current, line
from pages.parts.frame import begin
from pages.parts.verdict import fine_tune, judge
from pages.parts.words import layer_name, plain
from zo_core import export, plots
from zo_core.analysis.outliers import Verdict
from zo_core.jobs import ScanJob, command_line
from zo_core.tasks.catalog import TASKS

TEXTS = {"sample": "Bundled passages", "prompt": "Own prompt", "task": "A task"}
BOS = {"auto": "as the tokenizer does", "add": "add", "none": "leave out"}
PLACEMENT = {"resident": "on the device", "offload": "what fits", "stream": "a block at a time"}
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
                width=180,
                persist_state="session",
            )
        values["bos"] = st.selectbox(
            "BOS token",
            list(BOS),
            format_func=BOS.get,
            key="scan_bos",
            width=180,
            persist_state="session",
            help="The first token carries massive activations: BOS changes the answer.",
        )
        values["placement"] = st.selectbox(
            "Weights",
            list(PLACEMENT),
            format_func=PLACEMENT.get,
            key="scan_placement",
            width=180,
            persist_state="session",
            help="For models larger than the device: keep there what fits, the rest in CPU memory "
            "or on disk; or read one decoder block at a time from the files: a few GB are enough.",
        )
    launch.launch_row(ScanJob, values | choice.fields(), "Scan", key="start_scan")


@st.cache_data(max_entries=24, show_spinner=False)
def _table(path: str, changed: int) -> pd.DataFrame:
    return pd.read_parquet(path)


def table(entry: history.Entry, name: str) -> pd.DataFrame:
    """A result table of a scan, read once."""
    path = entry.run.result(f"{name}.parquet")
    return _table(str(path), path.stat().st_mtime_ns)


def clicked(chart: str) -> None:
    """Select the layer of the clicked cell."""
    points = st.session_state[chart].selection.points
    if points:
        st.session_state["outlier_layer"] = int(points[0]["customdata"][0])


def covered(tokens: pd.DataFrame, n_sequences: int) -> str:
    """Which sequences the token table holds; empty if all of them."""
    kept = tokens["sequence"].nunique()
    return f"first {kept} of {n_sequences} sequences" if kept < n_sequences else ""


def top_tokens(layer: int, row: pd.Series, tokens: pd.DataFrame) -> pd.DataFrame:
    """The ten largest tokens of a layer that are known: top-1 to 3 of the whole scan included."""
    columns = ["token", "sequence", "position", "channel", "magnitude"]
    best = [
        [row[f"top{r}_{c}"] for c in columns[:-1]] + [row[f"top{r}"]]
        for r in (1, 2, 3)
        if pd.notna(row.get(f"top{r}_sequence"))
    ]
    table = pd.concat(
        [pd.DataFrame(best, columns=columns), tokens.loc[tokens["layer"] == layer, columns]]
        if best
        else [tokens.loc[tokens["layer"] == layer, columns]]
    )
    # The token table has one row a token; top-2 may be another channel of the same token.
    table = table.drop_duplicates(["sequence", "position", "channel"])
    table = table.nlargest(10, "magnitude")
    return table.assign(token=table["token"].map(plots.visible))


def detail(
    layer: int,
    row: pd.Series,
    channels: pd.DataFrame,
    tokens: pd.DataFrame,
    part: str,
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
        st.dataframe(
            top_tokens(layer, row, tokens),
            hide_index=True,
            key="top_tokens",
            column_config={"magnitude": magnitude},
        )
        if part:
            st.caption(f"Top-1 to top-3 of the whole scan, and the rest from the {part}.")
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
    """CSV of every table, the summary and one HTML report."""
    part = covered(tokens := tables["tokens"], sequences(entry, tokens))
    st.caption(
        "Layers are 0-based; layer -1 is the embedding output. layers.csv: every layer over the "
        "whole scan. channels.csv: the largest magnitude by layer and channel. tokens.csv: the "
        f"largest magnitude by layer and token{f', of the {part}' if part else ''}. summary.json: "
        "job, device, precision and verdicts of the three."
    )
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
            "summary.json",
            lambda: export.json_bytes(
                {"run_id": entry.run_id, "job": entry.job.model_dump(mode="json")}
                | entry.summary
                | {"provenance": entry.run.result_json("provenance.json")}
            ),
            f"{entry.run_id}-summary.json",
            "application/json",
            key="download_summary",
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


def sequences(entry: history.Entry, tokens: pd.DataFrame) -> int:
    """How many sequences were scanned."""
    return entry.summary.get("n_sequences") or tokens["sequence"].nunique()


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
    part = covered(tokens, sequences(entry, tokens))
    if part:
        st.caption(f"The {part}: tokens of the others are not kept.")
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
    detail(layer, layers[layers["layer"] == layer].iloc[0], channels, tokens, part)

    st.subheader("Export", anchor=False)
    figures = [("Profile", profile), ("Layer by channel", by_channel), ("Layer by token", by_token)]
    downloads(entry, {"layers": layers, "channels": channels, "tokens": tokens}, verdict, figures)


def show(entry: history.Entry) -> None:
    """A scan, live or ended."""
    if entry.status.state == "done":
        results(entry)


begin(
    "Outliers",
    "A scan records the largest activations after every decoder layer. The Dominant-Layer paper "
    "suggests starting fine-tuning with the layer where massive activations first appear.",
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
