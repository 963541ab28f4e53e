"""Replay: rebuild tuned weights from base weights and ledger, and compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from zo_core import runs
from zo_core.artifacts.place import placed, prepare_ledger
from zo_core.artifacts.raw import digest, read_header
from zo_core.artifacts.source import STATE, base_of
from zo_core.artifacts.tensors import rebuilt_facts, tensors_metadata, write_manifest
from zo_core.errors import UserError
from zo_core.jobs import ReplayJob, TuneJob
from zo_core.progress import JobContext
from zo_core.recipes.reopen import reopened
from zo_core.runs import Run, to_json
from zo_core.zo.checkpoint import NAME, read_checkpoint
from zo_core.zo.scope import TunedScope
from zo_core.zo.trainer import make_optimizer, replay


def run_replay(job: ReplayJob, run: Run, context: JobContext) -> None:
    """Replay a tuning run up to its checkpoint, or a ledger file to its end."""
    summary = _from_run(job, context) if job.ledger is None else _from_file(job, run, context)
    context.log(
        f"{summary['run_id']}: {summary['steps']} steps replayed, "
        + ("bit for bit the same" if summary["identical"] else "not the same bits")
    )
    run.write_result("summary.json", to_json(summary))


def _from_run(job: ReplayJob, context: JobContext) -> dict[str, Any]:
    target, tune = _target(str(job.run))
    saved = read_checkpoint(target.path / NAME)
    records = [r for r in target.read_metrics()[0] if r["kind"] == "step"]
    if not 0 < saved.step <= len(records):
        raise UserError(f"run: {job.run} has no checkpoint to compare with: resume it first.")
    base = base_of(tune, target.status().details)
    with reopened(tune, job.device, base, context.log) as (loaded, scope):
        _walk(tune, scope, records[: saved.step], context)
        identical, difference = compare(scope, saved.weights)
    return {
        "run_id": job.run,
        "steps": saved.step,
        "identical": identical,
        "max_difference": difference,
        "device": str(loaded.device),
    }


def _from_file(job: ReplayJob, run: Run, context: JobContext) -> dict[str, Any]:
    """Rebuild the tensors of an exported ledger, whose run need not be in this run store."""
    ledger, place = prepare_ledger(job)
    tune = ledger.job.model_copy(update={"model": job.model or ledger.job.model})
    with reopened(tune, job.device, ledger.facts["base"], context.log) as (loaded, scope):
        _walk(tune, scope, ledger.records, context)
        tensors = {name: t.cpu().contiguous() for name, t in scope.master.items()}
        with placed(place, run.run_id) as temporary:
            facts = rebuilt_facts(ledger.facts)
            save_file(tensors, temporary, metadata=tensors_metadata(facts))
            write_manifest(facts, temporary, place.out)
            identical = _digest(temporary) == ledger.facts["digest"]
    return {
        "run_id": ledger.facts["run_id"],
        "steps": len(ledger.records),
        "identical": identical,
        "max_difference": 0.0 if identical else None,
        "device": str(loaded.device),
        "out": str(place.out),
    }


def _walk(
    tune: TuneJob, scope: TunedScope, records: Sequence[dict[str, Any]], context: JobContext
) -> None:
    """Apply ledger records, one after another."""
    optimizer = make_optimizer(tune)
    for record in records:
        replay(tune, scope, optimizer, [record])
        context.progress(record["step"], len(records), f"replaying step {record['step']}")
        context.check_cancelled()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        tensors = read_header(stream)[1]
        return digest(stream, {n: t for n, t in tensors.items() if not n.startswith(STATE)})


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


def _target(run_id: str) -> tuple[Run, TuneJob]:
    """The run that a job names, and its spec.

    Raises:
        UserError: it is not there, still runs, or has no ledger of scalars.
    """
    try:
        target = runs.get(run_id)
    except runs.RunNotFoundError as error:
        raise UserError(str(error)) from error
    tune = target.job
    assert isinstance(tune, TuneJob)
    if target.status().live:
        raise UserError(f"run: {run_id} is still going on: wait for its end, or cancel it.")
    if tune.optimizer == "adamw":
        raise UserError(
            f"run: {run_id} was tuned with adamw, whose gradients are no scalars: there is no "
            "ledger to replay. Its checkpoint holds the weights."
        )
    return target, tune
