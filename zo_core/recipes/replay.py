"""Replay: rebuild a run's tuned weights from base weights and ledger, and compare."""

from contextlib import closing

import torch

from zo_core import runs
from zo_core.errors import UserError
from zo_core.jobs import ReplayJob, TuneJob
from zo_core.progress import JobContext
from zo_core.recipes.scope import acquire, dominant_layer
from zo_core.runs import Run, to_json
from zo_core.scope_spec import parse
from zo_core.zo.checkpoint import NAME, read_checkpoint
from zo_core.zo.scope import TunedScope
from zo_core.zo.scopes import select
from zo_core.zo.trainer import make_optimizer, make_scope, replay


def run_replay(job: ReplayJob, run: Run, context: JobContext) -> None:
    """Replay a tuning run up to its checkpoint and say how far the weights are from it."""
    target, tune = _target(job)
    saved = read_checkpoint(target.path / NAME)
    records = [r for r in target.read_metrics()[0] if r["kind"] == "step"]
    if not 0 < saved.step <= len(records):
        raise UserError(f"run: {job.run} has no checkpoint to compare with: resume it first.")
    # dtype auto means another one on another device: the base weights would differ.
    dtype = target.status().details.get("fingerprint", {}).get("dtype", tune.dtype)
    tune = tune.model_copy(update={"device": job.device, "dtype": dtype})
    loaded = acquire(tune, context.log)
    spec = parse(tune.scope)
    dominant = dominant_layer(tune, spec, target, loaded, context)
    with closing(select(loaded, spec, dominant, tune.seed)) as selection:
        scope, optimizer = make_scope(tune, selection), make_optimizer(tune)
        try:
            for record in records[: saved.step]:
                replay(tune, scope, optimizer, [record])
                context.progress(record["step"], saved.step, f"replaying step {record['step']}")
                context.check_cancelled()
            identical, difference = compare(scope, saved.weights)
        finally:
            scope.close()
    context.log(
        f"{job.run}: {saved.step} steps replayed, "
        + ("bit for bit the checkpoint" if identical else f"largest difference {difference:g}")
    )
    summary = {
        "run_id": job.run,
        "steps": saved.step,
        "identical": identical,
        "max_difference": difference,
        "device": str(loaded.device),
    }
    run.write_result("summary.json", to_json(summary))


def compare(scope: TunedScope, saved: dict[str, torch.Tensor]) -> tuple[bool, float]:
    """Whether a scope's true weights are the saved ones bit for bit; the largest |difference|.

    Raises:
        UserError: the saved tensors are of another scope.
    """
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in scope.master.items()}:
        raise UserError("run: its checkpoint does not belong to its scope: the tensors differ.")
    identical, largest = True, 0.0
    for name, tensor in scope.master.items():
        here = tensor.cpu()
        identical &= torch.equal(here, saved[name])
        largest = max(largest, float((here.double() - saved[name].double()).abs().max()))
    return identical, largest


def _target(job: ReplayJob) -> tuple[Run, TuneJob]:
    """The run that a job names, and its spec.

    Raises:
        UserError: it is not there, still runs, or has no ledger of scalars.
    """
    try:
        target = runs.get(job.run)
    except runs.RunNotFoundError as error:
        raise UserError(str(error)) from error
    tune = target.job
    assert isinstance(tune, TuneJob)
    if target.status().live:
        raise UserError(f"run: {job.run} is still going on: wait for its end, or cancel it.")
    if tune.optimizer == "adamw":
        raise UserError(
            f"run: {job.run} was tuned with adamw, whose gradients are no scalars: there is no "
            "ledger to replay. Its checkpoint holds the weights."
        )
    return target, tune
