"""The fields of a user's own task: a file, a template, a word for each label."""

import hashlib
import re
from pathlib import Path

import streamlit as st

from zo_core.runs import replace_file
from zo_core.settings import settings
from zo_core.tasks.catalog import OWN_SUFFIXES

UPLOAD_MIB = 20
"""Larger files are named by their path."""


def own_fields(prefix: str) -> dict[str, str | None]:
    """The fields of a job spec that describe the own task, valid or not."""
    path = f"{prefix}_task_file"
    with st.container(horizontal=True, vertical_alignment="top", key=f"{prefix}_own_files"):
        st.file_uploader(
            f"Upload rows (CSV, JSONL or Parquet, at most {UPLOAD_MIB} MB)",
            type=[suffix.rpartition(".")[2] for suffix in OWN_SUFFIXES],
            key=f"{prefix}_upload",
            max_upload_size=UPLOAD_MIB,
            on_change=_keep_upload,
            args=(prefix,),
            width=360,
        )
        task_file = st.text_input(
            "File or folder",
            key=path,
            placeholder="filled in by an upload",
            help="A file with a header or JSON lines (split into train, dev and validation), or a "
            "folder that holds train and validation.",
            width=420,
            persist_state="session",
        )
    with st.container(horizontal=True, vertical_alignment="top"):
        template = st.text_area(
            "Template",
            key=f"{prefix}_template",
            placeholder="{sentence} It was",
            help="The prompt, with the names of fields in braces. The answer follows after a "
            "space, or at once if the template ends in a line break.",
            height=80,
            width=420,
            persist_state="session",
        )
        verbalizers = st.text_input(
            "Verbalizers",
            key=f"{prefix}_verbalizers",
            placeholder="0=terrible,1=great",
            help="A word for each value of the label field.",
            width=260,
            persist_state="session",
        )
        label_field = st.text_input(
            "Label field",
            value="label",
            key=f"{prefix}_label_field",
            width=150,
            persist_state="session",
        )
    return {
        "task_file": task_file.strip() or None,
        "template": template if template.strip() else None,
        "verbalizers": verbalizers.strip() or None,
        "label_field": label_field.strip(),
    }


def _keep_upload(prefix: str) -> None:
    """Store an uploaded file and put its path into the field beside it."""
    uploaded = st.session_state[f"{prefix}_upload"]
    if uploaded is not None:
        st.session_state[f"{prefix}_task_file"] = str(
            keep_upload(uploaded.name, uploaded.getvalue())
        )


def keep_upload(name: str, data: bytes) -> Path:
    """Store a file under ``uploads/`` of the cache; the same bytes are stored once.

    Args:
        name: as the browser says; only plain characters of its stem and a known suffix are kept.
        data: the content.
    """
    suffix = next((s for s in OWN_SUFFIXES if name.lower().endswith(s)), ".jsonl.gz")
    stem = Path(name).name.partition(".")[0]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:40] or "rows"
    folder = settings().cache_dir / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-{hashlib.blake2b(data, digest_size=6).hexdigest()}{suffix}"
    if not path.is_file():
        replace_file(path, data)
    return path.absolute()
