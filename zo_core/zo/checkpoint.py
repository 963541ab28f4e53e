"""Tuned tensors on disk, and the way back to a run's last step."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.runs import Run
from zo_core.zo.scope import TunedScope
from zo_core.zo.trainer import replay

NAME = "checkpoint.safetensors"


def save_checkpoint(run: Run, job: TuneJob, scope: TunedScope, step: int) -> None:
    """Write the master (fp32, by parameter name), replacing the checkpoint before it."""
    metadata = {"step": str(step), "model": job.model, "scope": job.scope, "seed": str(job.seed)}
    tensors = {name: tensor.cpu() for name, tensor in scope.master.items()}
    temporary = run.path / f".{NAME}"
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, run.path / NAME)
    finally:
        temporary.unlink(missing_ok=True)


def restore_run(
    run: Run,
    job: TuneJob,
    scope: TunedScope,
    tick: Callable[[int], None] = lambda _step: None,
) -> list[dict[str, Any]]:
    """Bring a scope to the last step of the run's ledger, and drop what was half written.

    Args:
        run: the run.
        job: its spec.
        scope: holds the base weights.
        tick: called with every replayed step; may raise to stop.

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
    saved, tensors = _read_checkpoint(run.path / NAME)
    if 0 < saved <= len(steps):
        scope.load(tensors)
    else:  # none, unreadable, or of a ledger that lost its end: the base weights and the ledger do
        saved = 0
    for record in steps[saved:]:
        replay(job, scope, [record])
        tick(record["step"])
    return records


def _read_checkpoint(path: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and tensors of a checkpoint; step 0 if there is none that can be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
        return step, load_file(path)
    except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError):
        return 0, {}
