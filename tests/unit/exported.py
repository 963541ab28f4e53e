"""Finished tuning runs, and exports of them, made by the recipes themselves."""

from pathlib import Path
from typing import Any

from zo_core import runs
from zo_core.jobs import ExportJob, TuneJob
from zo_core.progress import JobContext
from zo_core.recipes.export import run_export
from zo_core.recipes.tune import run_tune
from zo_core.runs import Run

SMALL: dict[str, Any] = {
    "batch_size": 2,
    "steps": 3,
    "train_examples": 8,
    "dev_examples": 0,
    "eval_examples": 4,
    "device": "cpu",
    "path": "reference",
}
SCOPES = ("layer:3", "channels:3:top1%", "lora:3", "full", "prefix")


def finished(scope: str) -> Run:
    """A run of a scope on the bundled model."""
    job = TuneJob(scope=scope, lr=1e-2 if scope in ("lora:3", "prefix") else None, **SMALL)
    run = runs.create(job, None)
    run_tune(job, run, JobContext(run))
    run.update(state="done")
    return run


def export(run: Run, form: str, out: Path | None = None, **more: Any) -> dict[str, Any]:
    """Do an export here, as the worker does; gives its summary."""
    job = ExportJob(run=run.run_id, form=form, out=out, device="cpu", **more)
    made = runs.create(job, None)
    try:
        run_export(job, made, JobContext(made))
    finally:
        made.update(state="done")
    found = made.result_json()
    assert found is not None
    return found
