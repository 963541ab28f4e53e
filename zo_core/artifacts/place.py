"""Where an export goes: never over anything else, all of it or nothing.

Everything is written beside its place under a hidden name, ``.<name>.<run id>.partial``, and moved
there in the end.
"""

import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from zo_core import failures, runs
from zo_core.artifacts.ledger import Ledger, is_ledger, read_ledger
from zo_core.artifacts.source import NAMES, Source, find_source
from zo_core.artifacts.tensors import companion, is_manifest, is_tensors_export, manifest_path
from zo_core.errors import UserError
from zo_core.jobs import ExportJob, ReplayJob
from zo_core.models.catalog import ModelError, resolve
from zo_core.run_jobs import Form
from zo_core.settings import settings

MANIFEST = "export.json"
"""In an exported folder: its facts, and the SHA-256 of its files."""
EXPORTS = "exports"
"""Folder in a run's own, for exports that were given no path."""
FILES: dict[Form, Callable[[Path], bool]] = {"tensors": is_tensors_export, "ledger": is_ledger}
"""Forms that are one file, and how a file of that form is known."""


@dataclass(frozen=True, slots=True)
class Place:
    """A checked target."""

    out: Path
    form: Form
    force: bool


def prepare(job: ExportJob) -> tuple[Source, Place]:
    """Everything about an export that can be said before it begins.

    Raises:
        UserError: see :func:`zo_core.artifacts.source.find_source` and :func:`check_place`.
    """
    source = find_source(job.run, job.weights, job.form)
    base = None
    with suppress(ModelError):  # tensors and ledger do without the base model
        where, folder = resolve(source.job.model)
        base = None if where == "hub" else Path(folder)
    out = job.out
    if out is None:
        out = source.run.path / EXPORTS / f"{job.run}{NAMES[job.form]}"
        out.parent.mkdir(exist_ok=True)
    return source, check_place(out, job.form, job.force, base)


def prepare_ledger(job: ReplayJob) -> tuple[Ledger, Place]:
    """Read the ledger of a replay and look at where its tensors go.

    Raises:
        UserError: one of them cannot be used.
    """
    assert job.ledger is not None
    assert job.out is not None
    return read_ledger(job.ledger), check_place(job.out, "tensors", job.force)


def check_place(out: Path, form: Form, force: bool, base: Path | None = None) -> Place:
    """Look at a target before anything is done.

    Args:
        out: file or folder to be written.
        form: what is written there.
        force: whether something else may be replaced (a file) or moved aside (a folder).
        base: folder of the base model, which stays as it is.

    Raises:
        UserError: there is something in the way.
    """
    out = Path(os.path.realpath(out.expanduser()))
    try:
        if not out.parent.is_dir():
            raise UserError(f"out: the folder {out.parent} does not exist: make it first.")
        if base is not None and _touches(out, Path(os.path.realpath(base))):
            raise UserError(f"out: {out} belongs to the base model: choose another path.")
        store = Path(os.path.realpath(settings().runs_dir))
        if store.is_relative_to(out) or (out.is_relative_to(store) and not _is_own(out, store)):
            raise UserError(f"out: {out} belongs to the run store: choose a path outside of it.")
        if form in FILES:
            _check_file(out, form, force)
        else:
            _check_folder(out, form, force)
    except OSError as error:
        raise UserError(f"out: {out} cannot be used: {error.strerror}.") from error
    return Place(out, form, force)


def _touches(out: Path, base: Path) -> bool:
    return out.is_relative_to(base) or base.is_relative_to(out)


def _is_own(out: Path, store: Path) -> bool:
    """Whether a path is ``<store>/<run id>/exports/<name>``, where exports without a path go."""
    parts = out.relative_to(store).parts
    return len(parts) == 3 and parts[1] == EXPORTS


def _check_file(out: Path, form: Form, force: bool) -> None:
    if out.is_dir():
        raise UserError(f"out: {out} is a folder: name a file for form {form}.")
    if out.exists() and not out.is_file():
        raise UserError(f"out: {out} is a device or a pipe: name a file for form {form}.")
    if out.exists() and not force and not FILES[form](out):
        raise UserError(
            f"out: {out} is there already and is no export of form {form}: choose another "
            "name, or replace it with force."
        )
    manifest = manifest_path(out)
    if form == "tensors" and manifest.exists() and not force and not is_manifest(manifest):
        raise UserError(
            f"out: the manifest would replace {manifest}, which is no export: choose another "
            "name, or replace it with force."
        )


def _check_folder(out: Path, form: Form, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file: name a folder for form {form}.")
    if not out.is_dir() or not any(out.iterdir()) or force or _is_folder_export(out, form):
        return
    raise UserError(
        f"out: the folder {out} is not empty and is no earlier export of form {form} alone: "
        "choose another, or move it aside with force."
    )


def _is_folder_export(out: Path, form: Form) -> bool:
    """Whether a folder holds an export of that form and not one file more."""
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        known = {MANIFEST, *manifest["files"]}
        return manifest["format"] == f"zoscope-{form}" and {p.name for p in out.iterdir()} <= known
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def placed(place: Place, run_id: str) -> Iterator[Path]:
    """A path to write to, which takes its place once the block has ended well.

    Args:
        place: where the file or folder belongs.
        run_id: the job that writes, so that what a killed job left can be told from a live one's.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """
    out = place.out
    temporary = out.with_name(f".{out.name}.{run_id}.partial")
    try:
        _sweep(out)
        _remove(temporary)
        if place.form not in FILES:
            temporary.mkdir()
        yield temporary
        check_place(out, place.form, place.force)
        _flush(temporary)
        if place.form in FILES:
            manifest = companion(temporary, out)
            if manifest.exists():
                os.replace(manifest, manifest_path(out))
            os.replace(temporary, out)
        else:
            _replace_folder(place, temporary, run_id)
    except Exception as error:
        if failures.is_full_disk(error):
            raise UserError(
                f"out: the disk of {out.parent} is full: free some space or choose another path; "
                "nothing was left there."
            ) from error
        if isinstance(error, OSError) and temporary.name in str(error.filename):
            raise UserError(
                f"out: {out} cannot be written ({error.strerror}): choose another path, or see to "
                "its permissions."
            ) from error
        raise
    finally:
        _remove(temporary)
        _remove(companion(temporary, out))


def _replace_folder(place: Place, temporary: Path, run_id: str) -> None:
    """Put a folder in place: an earlier export goes, anything else is kept beside it."""
    out = place.out
    if not out.exists():
        os.rename(temporary, out)
        return
    if not any(out.iterdir()):
        out.rmdir()
        os.rename(temporary, out)
        return
    earlier = _is_folder_export(out, place.form)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    name = f".{out.name}.{run_id}.old" if earlier else f"{out.name}.before-{stamp}"
    aside = out.with_name(name)
    os.rename(out, aside)
    try:
        os.rename(temporary, out)
    except OSError:
        os.rename(aside, out)
        raise
    if earlier:
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove what jobs left here that were killed while they wrote."""
    prefix = f".{out.name}."
    for left in out.parent.glob(f"{glob.escape(prefix)}*.partial"):
        with suppress(runs.RunNotFoundError, OSError, ValueError, TypeError, KeyError):
            if not runs.get(left.name.removeprefix(prefix).removesuffix(".partial")).status().live:
                _remove(left)


def _flush(path: Path) -> None:
    """Have the files on disk before they replace others."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
