"""The form fields of jobs that read texts."""

import streamlit as st
from pydantic import BaseModel

from pages.parts.forms import data_folder, task_picker

TEXTS = {"sample": "Bundled passages", "prompt": "Own prompt", "task": "A task"}
BOS = {"auto": "as the tokenizer does", "add": "add", "none": "leave out"}
NUMBERS = {
    "sequences": ("Sequences", "Texts that are read, one a sequence."),
    "max_tokens": (
        "Longest sequence (tokens)",
        "Longer texts are cut. The first tokens carry most massive activations.",
    ),
    "batch_size": ("Sequences a pass", "More is faster on a GPU, and needs more memory."),
}
BOS_HELP = (
    "The first token carries massive activations, so BOS changes the answer: Phi-2 has them from "
    "layer 1 on without BOS and from layer 2 with it, Gemma-7B only with it."
)
PLACEMENTS = {
    "resident": "on the device",
    "offload": "what fits",
    "stream": "a block at a time",
}
PLACEMENT_HELP = (
    "For models larger than the device: keep there what fits, the rest in CPU memory or on disk. "
    "A block at a time scans 7 or 8 billion parameters in a few GB of memory: each block is read "
    "from its safetensors files, used for all texts, and dropped. The numbers are the same."
)


def text_fields(prefix: str, spec: type[BaseModel]) -> dict:
    """Text source, number and length of texts, BOS, and placement if the job spec has one."""
    text = st.segmented_control(
        "Text",
        list(TEXTS),
        format_func=TEXTS.get,
        default="sample",
        key=f"{prefix}_text",
        required=True,
        persist_state="session",
    )
    values: dict = {"text": text}
    if text == "prompt":
        values["prompt"] = st.text_area(
            "Prompt",
            key=f"{prefix}_prompt",
            height=100,
            persist_state="session",
            placeholder="Any text: it becomes one sequence",
        )
    elif text == "task":
        with st.container(horizontal=True):
            values["task"] = task_picker(prefix, own=False)
            values["data_dir"] = data_folder(prefix)
    with st.container(horizontal=True):
        for name, (label, help_text) in NUMBERS.items():
            if name == "sequences" and text == "prompt":
                continue
            values[name] = st.number_input(
                label,
                value=spec.model_fields[name].default,
                step=1,
                key=f"{prefix}_{name}",
                width=175,
                persist_state="session",
                help=help_text,
            )
        values["bos"] = st.selectbox(
            "BOS token",
            list(BOS),
            format_func=BOS.get,
            key=f"{prefix}_bos",
            width=175,
            persist_state="session",
            help=BOS_HELP,
        )
        if "placement" in spec.model_fields:
            values["placement"] = st.selectbox(
                "Weights",
                list(PLACEMENTS),
                format_func=PLACEMENTS.get,
                key=f"{prefix}_placement",
                width=175,
                persist_state="session",
                help=PLACEMENT_HELP,
            )
    return values
