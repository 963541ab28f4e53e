"""Tune: zeroth-order fine-tuning of a scope, with evaluation before and after, and resume."""

from contextlib import closing
from statistics import fmean
from typing import Any

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.models.load import LoadedModel
from zo_core.progress import JobContext
from zo_core.provenance import provenance
from zo_core.recipes.scope import acquire, check_layers, dominant_layer
from zo_core.runs import Run, to_json
from zo_core.scope_spec import parse, spell
from zo_core.tasks.catalog import METRIC_NAMES
from zo_core.tasks.data import TaskData, load_job_task
from zo_core.tasks.evaluate import METRICS, evaluate
from zo_core.tasks.templates import Example, encode_rows
from zo_core.zo.checkpoint import restore_run, save_checkpoint
from zo_core.zo.fingerprint import base_weights, digest
from zo_core.zo.forward import CHUNK, FastForward, Forward, ReferenceForward
from zo_core.zo.path import choose_forward
from zo_core.zo.scope import TunedScope
from zo_core.zo.scopes import Selection, select
from zo_core.zo.trainer import LossNotFiniteError, Progress, make_optimizer, make_scope, train


def run_tune(job: TuneJob, run: Run, context: JobContext) -> None:
    """Tune a scope, or go on with a run that was interrupted."""
    data = load_job_task(job, job.train_examples, job.eval_examples, job.seed, job.dev_examples)
    spec = parse(job.scope)
    if spec.form == "prefix" and data.task.generates:
        raise UserError(
            f"scope: prefix cannot generate the answers of {job.task}: choose lora, or a task that "
            "is measured by accuracy."
        )
    check_layers(spec, job)
    loaded = acquire(job, context.log)
    dominant = dominant_layer(job, spec, run, loaded, context)
    with closing(select(loaded, spec, dominant, job.seed)) as selection:
        context.detail(
            layer=selection.layer, dominant_layer=dominant, scope=spell(job.scope, dominant)
        )
        _tune(job, run, context, data, loaded, selection)


def _tune(
    job: TuneJob,
    run: Run,
    context: JobContext,
    data: TaskData,
    loaded: LoadedModel,
    selection: Selection,
) -> None:
    """Evaluate, train and evaluate again; the model is as it was afterwards."""
    training, validation = _encode(data, loaded, loaded.context - selection.positions)
    metric = data.task.metric
    truncated = {
        "train": sum(e.truncated for e in training),
        "validation": sum(e.truncated for e in validation),
    }
    if any(truncated.values()):
        context.log(
            f"{truncated['train']} training and {truncated['validation']} validation rows are "
            f"longer than {loaded.context - selection.positions} tokens allow: cut on the left"
        )
    forward, reason = _choose_path(job, loaded, selection, training[:2])
    if isinstance(forward, FastForward):
        for examples in (training, validation):
            forward.register(examples)
    scope, optimizer = make_scope(job, selection), make_optimizer(job)
    context.detail(
        path=forward.name,
        path_reason=reason,
        lr=job.effective_lr,
        tuned_parameters=scope.size,
        truncated=truncated,
    )
    try:
        _same_as_before(run, context, _fingerprint(loaded, scope, training, validation))

        def replayed(step: int) -> None:
            context.progress(step, job.steps, f"replaying step {step}")
            context.check_cancelled()

        records, at = restore_run(run, job, scope, optimizer, replayed)
        progress = _progress_of(records, at)
        recorded = max((r["step"] for r in records), default=0)
        changed = [r["changed"] for r in records if "changed" in r]
        if progress.step:
            context.log(f"Resuming after step {progress.step}")
        evaluations = {r["step"]: r for r in records if r["kind"] == "eval"}

        def measure(step: int) -> None:
            if step in evaluations:
                return

            def tick(done: int) -> None:
                message = f"evaluating: {done} of {len(validation)} validation rows"
                context.progress(step, job.steps, message)
                context.check_cancelled()

            size = min(CHUNK, job.batch_size)
            result = evaluate(data.task, loaded, forward, validation, size, tick)
            record = {"kind": "eval", "step": step, "split": "validation", **result}
            run.append_metrics(record)
            evaluations[step] = record
            context.log(
                f"step {step}: validation {METRIC_NAMES[metric]} {result[metric]:.4f}, "
                f"loss {result['loss']:.4f} ({result['examples']} rows)"
            )

        def due(step: int) -> bool:
            return step in {0, job.steps} or bool(job.eval_every and step % job.eval_every == 0)

        def on_step(record: dict[str, Any]) -> None:
            step = record["step"]
            if step > recorded:  # else a first-order step after the last checkpoint, run again
                run.append_metrics(record)
                if "changed" in record:
                    changed.append(record["changed"])
            context.progress(step, job.steps, f"step {step} of {job.steps}")
            if step % job.checkpoint_every == 0 or step == job.steps:
                save_checkpoint(run, job, scope, optimizer, step)
            context.check_cancelled()
            if due(step):
                measure(step)

        def looks(step: int) -> bool:
            return due(step) or step % job.checkpoint_every == 0

        if due(progress.step):
            measure(progress.step)
        context.detail(before=_outcome(evaluations[0]))
        try:
            train(job, loaded, forward, scope, optimizer, training, progress, on_step, looks)
        except LossNotFiniteError:
            raise  # the weights have run away: the checkpoint before is the better one
        except BaseException:
            scope.restore()
            if progress.step and scope.settled:
                save_checkpoint(run, job, scope, optimizer, progress.step)
            raise
    finally:
        scope.close()

    rate = job.steps / progress.seconds if progress.seconds else None
    run.write_result(
        "summary.json",
        to_json(
            {
                "run_id": run.run_id,
                "model": job.model,
                "task": job.task,
                "scope": job.scope,
                "layer": selection.layer,
                "resolved_scope": run.status().details["scope"],
                "optimizer": job.optimizer,
                "precision": job.precision,
                "path": forward.name,
                "path_reason": reason,
                "steps": job.steps,
                "lr": job.effective_lr,
                "seed": job.seed,
                "metric": metric,
                "before": _outcome(evaluations[0]),
                "after": _outcome(evaluations[job.steps]),
                "steps_per_second": rate,
                "forward_passes": progress.forward_passes,
                "tuned_parameters": scope.size,
                "changed": fmean(changed) if changed else None,
                "seconds": round(progress.seconds, 3),
                "data": data.source,
                "train_examples": len(training),
                "dev_examples": len(data.dev),
                "truncated": truncated,
            }
        ),
    )
    facts = {"run_id": run.run_id, "job": job.model_dump()}
    run.write_result("provenance.json", to_json(facts | provenance(loaded)))


def _encode(
    data: TaskData, loaded: LoadedModel, longest: int
) -> tuple[list[Example], list[Example]]:
    """Tokenised training rows, as the loss needs them, and validation rows."""
    training = encode_rows(data.task, data.train, loaded.tokenizer, longest, training=True)
    validation = encode_rows(data.task, data.validation, loaded.tokenizer, longest)
    return training, validation


def _choose_path(
    job: TuneJob, loaded: LoadedModel, selection: Selection, examples: list[Example]
) -> tuple[Forward, str]:
    if job.reference_only:
        return ReferenceForward(loaded), job.reference_only
    return choose_forward(
        loaded,
        job.path,
        selection.lowest,
        examples,
        chunk=min(CHUNK, job.batch_size),
        steps=job.steps,
        tuned=selection.parameters,
    )


def _fingerprint(
    loaded: LoadedModel, scope: TunedScope, training: list[Example], validation: list[Example]
) -> dict[str, str]:
    """What a resumed run must find as it was, by the name it is called in the sentence."""
    return {
        "training rows": digest((e.label, e.rows) for e in training),
        "validation rows": digest((e.label, e.rows) for e in validation),
        "dtype": loaded.dtype_name,
        "kind of device": loaded.device.type,
        "base weights": base_weights(loaded, scope),
    }


def _same_as_before(run: Run, context: JobContext, now: dict[str, str]) -> None:
    """Keep the fingerprint of a new run; hold a resumed one against its own.

    Raises:
        UserError: something differs, so that going on would not be the same run.
    """
    before = run.status().details.get("fingerprint")
    if before is None:
        context.detail(fingerprint=now)
        return
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(
            f"The {' and the '.join(changed)} differ from those this run began with: restore them "
            "to resume it, or start a new run."
        )


def _progress_of(records: list[dict[str, Any]], at: int) -> Progress:
    steps = [r for r in records if r["kind"] == "step"]
    if not at:
        return Progress()
    last = steps[at - 1]
    return Progress(last["step"], last["seconds"], last["forward_passes"])


def _outcome(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in METRICS if name in record}
