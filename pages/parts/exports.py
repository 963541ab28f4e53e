"""What a tuning run leaves for other programs: tensors, ledger, model and adapter folders."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from pages.parts import history, launch
from pages.parts.words import plain
from zo_core import backend, runs
from zo_core.artifacts.ledger import ledger_bytes
from zo_core.artifacts.place import EXPORTS, MANIFEST
from zo_core.artifacts.source import NAMES, Source, find_source, forms_of
from zo_core.artifacts.tensors import tensors_bytes
from zo_core.errors import UserError
from zo_core.jobs import ExportJob
from zo_core.models.catalog import BYTES_PER_VALUE, describe, resolve

LARGEST = 200_000_000
"""Bytes of a model folder up to which the page offers it as a zip archive."""


def buttons(entry: history.Entry) -> None:
    """Downloads of the tuned tensors and of the ledger, once the run has ended."""
    source = _source(entry)
    if source is None:
        return
    which = source.says
    _download("Tuned tensors", lambda: tensors_bytes(source), "tensors", source, which)
    if not forms_of(source.job)["ledger"]:
        help_text = f"A few bytes a step: with the base model they rebuild the weights ({which})"
        _download("Ledger", lambda: ledger_bytes(source), "ledger", source, help_text)


def folders(entry: history.Entry) -> None:
    """The commands that write a model or adapter folder, and small ones as an archive."""
    source = _source(entry)
    if source is None:
        return
    reasons = forms_of(source.job)
    forms = [form for form in ("model", "adapter") if not reasons[form]]
    if not forms:
        return
    with st.expander("Model folder", icon=":material/folder_zip:", key="tune_exports"):
        st.caption(
            plain(
                f"A folder that transformers{' or peft' if 'adapter' in forms else ''} loads, made "
                f"from {source.says}. These commands write it where you say:"
            )
        )
        for form in forms:
            name = f"{source.run.run_id}{NAMES[form]}"
            launch.command(ExportJob(run=source.run.run_id, form=form, out=Path(name)))
        with st.container(horizontal=True, vertical_alignment="center"):
            for form in forms:
                if form == "adapter" or _is_small(source):
                    _archive(form, source)
        run_id = st.session_state.get(f"export_{source.run.run_id}")
        if run_id:
            _follow(run_id)


def _source(entry: history.Entry) -> Source | None:
    if entry.status.live:
        return None
    try:
        return find_source(entry.run_id)
    except UserError:  # it has no checkpoint: there is nothing to download
        return None


def _download(
    label: str, data: Callable[[], bytes], form: str, source: Source, help_text: str
) -> None:
    st.download_button(
        label,
        data,
        f"{source.run.run_id}{NAMES[form]}",
        "application/octet-stream",
        key=f"download_{form}",
        icon=":material/download:",
        on_click="ignore",
        help=plain(help_text),
    )


@st.cache_data(show_spinner=False, ttl=600)
def _model_bytes(model: str, revision: str | None, dtype: str) -> int:
    return describe(model, revision).parameters * BYTES_PER_VALUE.get(dtype, 4)


def _is_small(source: Source) -> bool:
    """Whether the whole model is small enough for an archive; asks no hub."""
    job = source.job
    dtype = str(source.details.get("fingerprint", {}).get("dtype", "float32"))
    try:
        local = resolve(job.model)[0] != "hub"
        return local and _model_bytes(job.model, job.revision, dtype) <= LARGEST
    except UserError:
        return False


def _archive(form: str, source: Source) -> None:
    """A button that has the engine make a folder, or the download of the one that is there."""
    folder = source.run.path / EXPORTS / f"{source.run.run_id}{NAMES[form]}"
    if _is_of(folder, source):
        _download(f"{form.capitalize()} (zip)", lambda: _zip(folder), form, source, source.says)
    elif st.button(
        f"Make the {form} for download", key=f"make_{form}", icon=":material/play_arrow:"
    ):
        try:
            made = backend.submit(ExportJob(run=source.run.run_id, form=form))
        except (backend.BackendError, OSError) as error:
            st.error(plain(str(error)), icon=":material/error:")
        else:
            st.session_state[f"export_{source.run.run_id}"] = made.run_id


def _is_of(folder: Path, source: Source) -> bool:
    """Whether a folder holds the weights that an export would be of now."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return (manifest["step"], manifest["weights"]) == (source.step, source.weights)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _zip(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # weights do not shrink
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{folder.name}/{file.name}")
    return buffer.getvalue()


def _follow(run_id: str) -> None:
    """The state of an export, looked at each second until it has ended."""
    try:
        run = runs.get(run_id)
        live = run.status().live
    except (runs.RunNotFoundError, OSError, ValueError):
        return

    def tick() -> None:
        entry = history.read(run)
        if entry is None:
            return
        if entry.status.live:
            st.caption("Waiting…" if entry.status.state == "queued" else "Writing…")
        elif entry.status.state != "done":
            sentence = entry.status.error or entry.status.message or "The export ended early."
            st.error(plain(sentence), icon=":material/error:")
        if live and not entry.status.live:
            st.rerun()

    st.fragment(tick, run_every=1.0 if live else None)()
