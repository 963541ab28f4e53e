"""Tuned tensors on disk, and the way back to a run's last step."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.runs import Run
from zo_core.zo.first_order import AdamW
from zo_core.zo.optimizers import ZoSgd
from zo_core.zo.scope import TunedScope
from zo_core.zo.trainer import replay

NAME = "checkpoint.safetensors"
BEST = "best.safetensors"
STATE = "optimizer/"
"""What the names of an optimizer's tensors begin with."""


@dataclass(slots=True)
class Checkpoint:
    """What a checkpoint file holds; step 0 if there is none that can be read."""

    step: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tuned tensors by parameter name: fp32, or in the working dtype with precision inplace."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """The optimizer's tensors, float32."""


def save_checkpoint(run: Run, job: TuneJob, scope: TunedScope, optimizer: ZoSgd, step: int) -> None:
    """Write true weights and optimizer state in one file, replacing the checkpoint before it."""
    state = {f"{STATE}{n}": t.detach() for n, t in optimizer.state().items()}
    _replace(run, NAME, job, scope.master | state, step)


def save_best(run: Run, job: TuneJob, weights: Mapping[str, torch.Tensor], step: int) -> None:
    """Write the true weights of the best step, replacing those of the best before it."""
    _replace(run, BEST, job, weights, step)


def _replace(
    run: Run, name: str, job: TuneJob, tensors: Mapping[str, torch.Tensor], step: int
) -> None:
    metadata = {"step": str(step), "model": job.model, "scope": job.scope, "seed": str(job.seed)}
    temporary = run.path / f".{name}"
    try:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, metadata)
        os.replace(temporary, run.path / name)
    finally:
        temporary.unlink(missing_ok=True)


def rebuild(
    job: TuneJob, scope: TunedScope, optimizer: ZoSgd, steps: Sequence[dict[str, Any]]
) -> None:
    """Set a scope to the base weights and replay a ledger from its first step.

    Args:
        job: the run's spec.
        scope: what was tuned.
        optimizer: has no state yet.
        steps: the ledger up to the step that is wanted.
    """
    scope.load(scope.base)
    replay(job, scope, optimizer, steps)


def restore_run(
    run: Run,
    job: TuneJob,
    scope: TunedScope,
    optimizer: ZoSgd,
    tick: Callable[[int], None] = lambda _step: None,
) -> tuple[list[dict[str, Any]], int]:
    """Bring scope and optimizer back, and drop what was half written.

    A zeroth-order run comes back to the last step of its ledger. A first-order run comes back to
    its checkpoint: the steps after it are run again.

    Args:
        run: the run.
        job: its spec.
        scope: holds the base weights.
        optimizer: has no state yet.
        tick: called with every replayed step; may raise to stop.

    Returns:
        The metric records that hold, in order, empty for a new run; and the step that scope and
        optimizer are at.

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
    saved = read_checkpoint(run.path / NAME)
    at = 0
    if 0 < saved.step <= len(steps):
        scope.load(saved.weights)
        optimizer.load(saved.state)
        at = saved.step
    # Else none, unreadable, or of a ledger that lost its end: the base weights and the ledger do.
    if isinstance(optimizer, AdamW):
        return records, at
    for record in steps[at:]:
        replay(job, scope, optimizer, [record])
        tick(record["step"])
    return records, len(steps)


def read_checkpoint(path: Path) -> Checkpoint:
    """What a checkpoint file holds."""
    step = step_of(path)
    if step is None:
        return Checkpoint()
    tensors = load_file(path)
    return Checkpoint(
        step,
        {n: t for n, t in tensors.items() if not n.startswith(STATE)},
        {n.removeprefix(STATE): t for n, t in tensors.items() if n.startswith(STATE)},
    )


def step_of(path: Path) -> int | None:
    """The step whose weights a file holds; None if there is none that can be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # finds a cut file, too
            return int(file.metadata()["step"])
    except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError):
        return None
