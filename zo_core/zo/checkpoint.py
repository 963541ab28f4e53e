"""Tuned tensors on disk, and the way back to a run's last step."""

import os
from typing import Any

import safetensors
from safetensors.torch import load_file, save

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.runs import Run, replace_file
from zo_core.zo.scope import TunedScope
from zo_core.zo.trainer import replay

NAME = "checkpoint.safetensors"


def save_checkpoint(run: Run, job: TuneJob, scope: TunedScope, step: int) -> None:
    """Write the master (fp32, by parameter name), replacing the checkpoint before it."""
    metadata = {"step": str(step), "model": job.model, "scope": job.scope, "seed": str(job.seed)}
    tensors = {name: tensor.cpu() for name, tensor in scope.master.items()}
    replace_file(run.path / NAME, save(tensors, metadata=metadata))


def restore_run(run: Run, job: TuneJob, scope: TunedScope) -> list[dict[str, Any]]:
    """Bring a scope to the last step of the run's ledger, and drop what was half written.

    Returns:
        The metric records that hold, in order; empty for a new run.

    Raises:
        UserError: the ledger has a gap, or the checkpoint is of another scope.
    """
    records, end = run.read_metrics()
    path = run.path / "metrics.jsonl"
    if path.exists() and path.stat().st_size > end:
        os.truncate(path, end)  # a line torn by a crash must not swallow the next one
    steps = [r for r in records if r["kind"] == "step"]
    if [r["step"] for r in steps] != list(range(1, len(steps) + 1)):
        raise UserError(f"The ledger of {run.run_id} has a gap: it cannot be resumed.")
    saved = 0
    checkpoint = run.path / NAME
    if checkpoint.exists():
        with safetensors.safe_open(checkpoint, framework="pt") as file:
            saved = int(file.metadata()["step"])
        if saved <= len(steps):
            scope.load(load_file(checkpoint))
        else:  # the ledger lost its end: replay from the base weights instead
            saved = 0
    replay(job, scope, steps[saved:])
    return records
