"""Export: write a tuning run's weights in a form that other programs read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zo_core.artifacts.card import card
from zo_core.artifacts.ledger import write_ledger
from zo_core.artifacts.place import MANIFEST, placed, prepare
from zo_core.artifacts.raw import sha256
from zo_core.artifacts.source import Source, facts
from zo_core.artifacts.tensors import write_manifest, write_tensors
from zo_core.jobs import ExportJob
from zo_core.progress import JobContext
from zo_core.recipes.export_model import write_adapter, write_model
from zo_core.runs import Run, to_json

Folder = Callable[[Source, ExportJob, Path, JobContext], dict[str, Any]]
"""Fills a folder and says what its card adds to the facts."""
FOLDERS: dict[str, Folder] = {"model": write_model, "adapter": write_adapter}


def run_export(job: ExportJob, run: Run, context: JobContext) -> None:
    """Write one export, all of it or nothing."""
    source, place = prepare(job)
    context.log(f"{job.run}: {source.says}, as {job.form}")
    with placed(place, run.run_id) as temporary:
        if job.form in FOLDERS:
            found = _folder(job, source, temporary, context)
        else:
            found = _file(job, source, temporary, place.out)
    summary = {
        "run_id": job.run,
        "form": job.form,
        "out": str(place.out),
        "weights": source.weights,
        "step": source.step,
        "steps": source.job.steps,
        "state": source.state,
        "bytes": sum(f.stat().st_size for f in _files(place.out)),
        "sha256": found,
    }
    run.write_result("summary.json", to_json(summary))


def _file(job: ExportJob, source: Source, temporary: Path, out: Path) -> dict[str, str]:
    write = write_tensors if job.form == "tensors" else write_ledger
    with temporary.open("wb") as stream:
        found = write(source, stream)
    if job.form == "tensors":
        write_manifest(found, temporary, out)
    return {out.name: sha256(temporary)}


def _folder(job: ExportJob, source: Source, temporary: Path, context: JobContext) -> dict[str, str]:
    more = FOLDERS[job.form](source, job, temporary, context)
    manifest = facts(source, job.form) | more
    (temporary / "README.md").write_text(card(source, manifest))
    sums = {}
    for file in _files(temporary):
        context.progress(0, 0, f"checksum of {file.name}")
        context.check_cancelled()
        sums[file.name] = sha256(file)
    manifest["files"] = sums
    text = json.dumps(json.loads(to_json(manifest)), indent=1)
    (temporary / MANIFEST).write_text(f"{text}\n")
    return sums


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]
