"""Tune: zeroth-order fine-tuning of a scope, with evaluation before and after, and resume."""

import hashlib
from collections.abc import Iterable
from typing import Any

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.models import resident
from zo_core.models.catalog import describe
from zo_core.models.load import LoadedModel
from zo_core.progress import JobContext
from zo_core.provenance import provenance
from zo_core.recipes.scan import find_first_outlier_layer
from zo_core.runs import Run, to_json
from zo_core.tasks.catalog import METRIC_NAMES
from zo_core.tasks.data import TaskData, load_job_task
from zo_core.tasks.evaluate import METRICS, evaluate
from zo_core.tasks.templates import Example, encode_rows
from zo_core.zo.checkpoint import restore_run, save_checkpoint
from zo_core.zo.forward import CHUNK, FastForward
from zo_core.zo.path import choose_forward
from zo_core.zo.scope import TunedScope, check_layer, scope_parameters
from zo_core.zo.trainer import LossNotFiniteError, Progress, train

AUTO = "layer:auto"


def run_tune(job: TuneJob, run: Run, context: JobContext) -> None:
    """Tune a scope, or go on with a run that was interrupted."""
    data = load_job_task(job, job.train_examples, job.eval_examples, job.seed, job.dev_examples)
    layer = _known_layer(job, run)
    loaded = resident.acquire(job, context.log)
    if layer is None and job.scope == AUTO:
        layer = _dominant_layer(job, loaded, context)
    training, validation = _encode(data, loaded)
    metric = data.task.metric
    truncated = {
        "train": sum(e.truncated for e in training),
        "validation": sum(e.truncated for e in validation),
    }
    if any(truncated.values()):
        context.log(
            f"{truncated['train']} training and {truncated['validation']} validation rows are "
            f"longer than {loaded.context} tokens allow: cut on the left"
        )
    chunk = min(CHUNK, job.batch_size)
    forward, reason = choose_forward(loaded, job.path, layer, training[:2], chunk)
    if isinstance(forward, FastForward):
        for examples in (training, validation):
            forward.register(examples)
    scope = TunedScope(scope_parameters(loaded, layer))
    context.detail(
        layer=layer,
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

        records = restore_run(run, job, scope, replayed)
        progress = _progress_of(records)
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
            run.append_metrics(record)
            context.progress(step, job.steps, f"step {step} of {job.steps}")
            if step % job.checkpoint_every == 0 or step == job.steps:
                save_checkpoint(run, job, scope, step)
            context.check_cancelled()
            if due(step):
                measure(step)

        if due(progress.step):
            measure(progress.step)
        context.detail(before=_outcome(evaluations[0]))
        try:
            train(job, forward, scope, training, progress, on_step)
        except LossNotFiniteError:
            raise  # the weights have run away: the checkpoint before is the better one
        except BaseException:
            scope.restore()
            if progress.step:
                save_checkpoint(run, job, scope, progress.step)
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
                "layer": layer,
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


def _known_layer(job: TuneJob, run: Run) -> int | None:
    """The tuned layer as far as it is known before anything is loaded.

    None for the full model, or where ``layer:auto`` has to look. A resumed run keeps its layer.

    Raises:
        UserError: the model has no such layer.
    """
    if job.scope == "full":
        return None
    if job.scope == AUTO:
        named = run.status().details.get("layer")
    else:
        named = int(job.scope.removeprefix("layer:"))
    if named is None:
        return None
    return check_layer(named, describe(job.model, job.revision).n_layers, job.model)


def _dominant_layer(job: TuneJob, loaded: LoadedModel, context: JobContext) -> int:
    """The layer that the job's rule names.

    Raises:
        UserError: it names none.
    """
    context.progress(0, job.steps, "looking for the first outlier layer")
    verdict = find_first_outlier_layer(loaded, job.rule, context)
    if verdict.layer is None:
        raise UserError(
            f"scope: the rule {job.rule} names no first outlier layer of {job.model} "
            f"({verdict.reason.rstrip('.')}): choose a layer, for example layer:1, or another rule."
        )
    context.log(f"layer:auto is layer {verdict.layer}: {verdict.reason}")
    return verdict.layer


def _encode(data: TaskData, loaded: LoadedModel) -> tuple[list[Example], list[Example]]:
    """Tokenised training rows, as the loss needs them, and validation rows."""
    training = encode_rows(data.task, data.train, loaded.tokenizer, loaded.context, training=True)
    validation = encode_rows(data.task, data.validation, loaded.tokenizer, loaded.context)
    return training, validation


def _fingerprint(
    loaded: LoadedModel, scope: TunedScope, training: list[Example], validation: list[Example]
) -> dict[str, str]:
    """What a resumed run must find as it was, by the name it is called in the sentence."""

    def digest(parts: Iterable[object]) -> str:
        text = "\n".join(map(str, parts))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    sums = (m.double().sum().item() for m in scope.master.values())
    return {
        "training rows": digest((e.label, e.rows) for e in training),
        "validation rows": digest((e.label, e.rows) for e in validation),
        "dtype": loaded.dtype_name,
        "kind of device": loaded.device.type,
        "base weights": digest(f"{s:.6e}" for s in sums),
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


def _progress_of(records: list[dict[str, Any]]) -> Progress:
    steps = [r for r in records if r["kind"] == "step"]
    if not steps:
        return Progress()
    last = steps[-1]
    return Progress(last["step"], last["seconds"], last["forward_passes"])


def _outcome(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in METRICS if name in record}
