"""The form fields of jobs that read texts."""

import streamlit as st
from pydantic import BaseModel

from pages.parts.forms import data_folder, task_picker

TEXTS = {"sample": "Bundled passages", "prompt": "Own prompt", "task": "A task"}
BOS = {"auto": "as the tokenizer does", "add": "add", "none": "leave out"}


def text_fields(prefix: str, spec: type[BaseModel]) -> dict:
    """Text source, number and length of texts, and BOS, as fields of a job spec."""
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
        for name, label in (
            ("sequences", "Sequences"),
            ("max_tokens", "Longest sequence (tokens)"),
            ("batch_size", "Sequences a pass"),
        ):
            if name == "sequences" and text == "prompt":
                continue
            values[name] = st.number_input(
                label,
                value=spec.model_fields[name].default,
                step=1,
                key=f"{prefix}_{name}",
                width=190,
                persist_state="session",
            )
        values["bos"] = st.selectbox(
            "BOS token",
            list(BOS),
            format_func=BOS.get,
            key=f"{prefix}_bos",
            width=190,
            persist_state="session",
            help="The first token carries massive activations: BOS changes the answer.",
        )
    return values
