"""Form fields that several jobs have in common."""

import re

import streamlit as st

from pages.parts.choice import Choice, describe
from zo_core.tasks.catalog import OWN, TASKS

_RANGE = re.compile(r"^(\d{1,5})-(\d{1,5})$")


def task_picker(prefix: str, own: bool = True) -> str:
    """The task of a job; with ``own``, the user's rows are offered as well."""
    return st.selectbox(
        "Task",
        [*TASKS, OWN] if own else [*TASKS],
        format_func=lambda task: TASKS[task].title if task in TASKS else "Your own rows",
        key=f"{prefix}_task",
        width=210,
        persist_state="session",
    )


def data_folder(prefix: str) -> str | None:
    """The local folder of task data; None if the field is empty."""
    folder = st.text_input(
        "Data folder",
        key=f"{prefix}_data_dir",
        placeholder="optional: holds <task>/train.jsonl",
        help="For tasks that are not bundled, on a machine without network. It holds "
        "<task>/{train,validation}.jsonl, .jsonl.gz or .parquet.",
        width=320,
        persist_state="session",
    )
    return folder.strip() or None


def missing_layers(choice: Choice, layers: list[int | str]) -> str:
    """The sentence about layers that the chosen model lacks; empty if it has them all."""
    info, _ = describe(choice)
    beyond = [k for k in layers if info and isinstance(k, int) and k >= info.n_layers]
    if not beyond:
        return ""
    return f"{choice.label} has layers 0 to {info.n_layers - 1}: there is no layer {beyond[0]}."


def parse_layers(text: str) -> list[int | str] | None:
    """``0,3,8-11`` as indices; None for all layers. Anything else is left for the job to refuse."""
    if text.strip().lower() in ("", "all"):
        return None
    layers: list[int | str] = []
    for part in filter(None, re.split(r"[,\s]+", text.strip())):
        span = _RANGE.match(part)
        if span and int(span[1]) <= int(span[2]):
            layers.extend(range(int(span[1]), int(span[2]) + 1))
        else:
            layers.append(int(part) if part.isdecimal() else part)
    return layers
