"""The fields of a scan."""

from typing import Any

import streamlit as st

from pages.parts import launch
from pages.parts.choice import Choice
from zo_core.jobs import ScanJob
from zo_core.tasks.catalog import TASKS

TEXTS = {"sample": "Bundled passages", "prompt": "Own prompt", "task": "A task"}
BOS = {"auto": "as the tokenizer does", "add": "add", "none": "leave out"}
NUMBERS = {
    "sequences": ("Sequences", "Texts that are scanned; memory does not grow with their number."),
    "max_tokens": (
        "Longest sequence (tokens)",
        "Longer texts are cut. The first tokens carry most massive activations.",
    ),
    "batch_size": ("Sequences a pass", "More is faster on a GPU, and needs more memory."),
}
PLACEMENTS = {
    "resident": "on the device",
    "offload": "what fits",
    "stream": "a block at a time",
}
PLACEMENT_HELP = (
    "For models larger than the device: keep there what fits, the rest in CPU memory or on disk. A "
    "block at a time scans 7 or 8 billion parameters in a few GB of memory: each is read from "
    "its safetensors files, used for all texts, and dropped. The numbers are the same."
)
BOS_HELP = (
    "The first token carries massive activations, so BOS changes the answer: Phi-2 has them from "
    "layer 1 on without BOS and from layer 2 with it, Gemma-7B only with it."
)


def form(choice: Choice) -> None:
    """The fields of a scan, its command and the button."""
    text = st.segmented_control(
        "Text",
        list(TEXTS),
        format_func=TEXTS.get,
        default="sample",
        key="scan_text",
        required=True,
        persist_state="session",
    )
    values: dict[str, Any] = {"text": text}
    if text == "prompt":
        values["prompt"] = st.text_area(
            "Prompt",
            key="scan_prompt",
            height=100,
            persist_state="session",
            placeholder="Any text: it becomes one sequence",
        )
    elif text == "task":
        values |= _task()
    with st.container(horizontal=True):
        for name, (label, help_text) in NUMBERS.items():
            if name == "sequences" and text == "prompt":
                continue
            values[name] = st.number_input(
                label,
                value=ScanJob.model_fields[name].default,
                step=1,
                key=f"scan_{name}",
                width=175,
                persist_state="session",
                help=help_text,
            )
        values["bos"] = st.selectbox(
            "BOS token",
            list(BOS),
            format_func=BOS.get,
            key="scan_bos",
            width=175,
            persist_state="session",
            help=BOS_HELP,
        )
        values["placement"] = st.selectbox(
            "Weights",
            list(PLACEMENTS),
            format_func=PLACEMENTS.get,
            key="scan_placement",
            width=175,
            persist_state="session",
            help=PLACEMENT_HELP,
        )
    launch.launch_row(ScanJob, values | choice.fields(), "Scan", key="start_scan")


def _task() -> dict[str, Any]:
    with st.container(horizontal=True):
        task = st.selectbox(
            "Task",
            list(TASKS),
            format_func=lambda t: TASKS[t].title,
            key="scan_task",
            width=260,
            persist_state="session",
        )
        folder = st.text_input(
            "Data folder",
            key="scan_data_dir",
            persist_state="session",
            placeholder="optional: holds <task>/train.jsonl",
        )
    return {"task": task, "data_dir": folder or None}
