"""Tune: zeroth-order fine-tuning of a scope, evaluated before, on the way and after; resume."""

from contextlib import ExitStack, closing
from statistics import fmean
from typing import Any

from zo_core import trackers
from zo_core.errors import MemoryExhaustedError, UserError
from zo_core.jobs import TuneJob
from zo_core.models.load import LoadedModel, pick_device, pick_dtype
from zo_core.progress import JobContext
from zo_core.provenance import provenance
from zo_core.recipes.evaluations import Evaluations
from zo_core.recipes.scope import acquire, check_layers, dominant_layer
from zo_core.runs import Run, to_json
from zo_core.scope_spec import parse, spell
from zo_core.tasks.data import TaskData, load_job_task
from zo_core.tasks.templates import Example, encode_rows
from zo_core.trackers import Trackers
from zo_core.zo.checkpoint import restore_run, save_checkpoint
from zo_core.zo.fingerprint import base_weights, digest
from zo_core.zo.forward import CHUNK, FastForward
from zo_core.zo.out_of_memory import MemoryLadder
from zo_core.zo.path import check_fp8, choose_forward, fp8_reason, reference_forward
from zo_core.zo.reference import Forward
from zo_core.zo.scope import TunedScope
from zo_core.zo.scopes import Selection, select
from zo_core.zo.trainer import LossNotFiniteError, Progress, make_optimizer, make_scope, train

FP8_ROWS = 4
"""Training rows on which an fp8 suffix is tried."""


class PatienceOverError(Exception):
    """The dev loss has not improved for so many evaluations; ends the training loop."""


def run_tune(job: TuneJob, run: Run, context: JobContext) -> None:
    """Tune a scope, or go on with a run that was interrupted."""
    trackers.check(job.track)
    if job.suffix == "fp8":  # before anything is loaded
        device = pick_device(job.device)
        check_fp8(device, pick_dtype(job.dtype, device))
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
    examples = _encode(data, loaded, loaded.context - selection.positions)
    training = examples["train"]
    truncated = {split: sum(e.truncated for e in rows) for split, rows in examples.items()}
    if any(truncated.values()):
        cut = ", ".join(f"{count} {split}" for split, count in truncated.items())
        context.log(
            f"{cut} rows are longer than {loaded.context - selection.positions} tokens allow: "
            "cut on the left"
        )
    if not (data.dev and job.eval_every):
        why = "eval_every is 0" if data.dev else "dev_examples is 0"
        context.log(f"No dev evaluations, as {why}: the last weights are kept")
    forward, reason = _choose_path(job, loaded, selection, training[:2])
    if isinstance(forward, FastForward):
        for rows in examples.values():
            forward.register(rows)
    scope, optimizer = make_scope(job, selection), make_optimizer(job)
    with ExitStack() as closed:
        closed.callback(scope.close)
        if isinstance(forward, FastForward) and forward.fp8:
            reason += "; " + fp8_reason(job, loaded, forward, scope, training[:FP8_ROWS])
        context.detail(
            path=forward.name,
            path_reason=reason,
            lr=job.effective_lr,
            tuned_parameters=scope.size,
            truncated=truncated,
        )
        _same_as_before(run, context, _fingerprint(loaded, scope, examples))

        def replayed(step: int) -> None:
            context.progress(step, job.steps, f"replaying step {step}")
            context.check_cancelled()

        records, at = restore_run(run, job, scope, optimizer, replayed)
        progress = _progress_of(records, at)
        recorded = max((r["step"] for r in records), default=0)
        changed = [r["changed"] for r in records if "changed" in r]
        if progress.step:
            context.log(f"Resuming after step {progress.step}")
        tracking = closed.enter_context(closing(Trackers(job, run, records, context.log)))

        def keep(record: dict[str, Any]) -> None:
            run.append_metrics(record)
            tracking.log(record)

        ladder, ladder_of_evaluations = _ladders(job, run, context, forward, examples)
        evaluations = Evaluations(
            *(job, run, context, data.task, loaded, forward, ladder_of_evaluations),
            *(scope, examples, keep, records),
        )
        evaluations.resume(optimizer, progress.step, records)

        def saves(step: int) -> bool:
            return step % job.checkpoint_every == 0 or step == job.steps

        def looks(step: int) -> bool:
            return saves(step) or evaluations.due(step)

        def on_step(record: dict[str, Any]) -> None:
            step = record["step"]
            if step > recorded:  # else a first-order step after the last checkpoint, run again
                keep(record)
                if "changed" in record:
                    changed.append(record["changed"])
            context.progress(step, job.steps, f"step {step} of {job.steps}")
            if looks(step):
                if saves(step):
                    save_checkpoint(run, job, scope, optimizer, step)
                context.check_cancelled()
                if evaluations.look(step):
                    raise PatienceOverError
            context.check_cancelled()

        def steps() -> None:
            if evaluations.look(progress.step):  # the last step's may have been cut off
                raise PatienceOverError
            train(
                *(job, loaded, forward, scope, optimizer, training, progress, on_step, looks),
                ladder.micro_batch,
            )

        def come_back() -> None:
            """As a resumed run does: a step that broke off may have moved some of the weights."""
            nonlocal progress, recorded
            progress = Progress()  # on the way back the weights are of no step to be saved
            optimizer.load({})
            scope.load(scope.base)
            records, at = restore_run(run, job, scope, optimizer, replayed)
            progress = _progress_of(records, at)
            recorded = max((r["step"] for r in records), default=0)

        before = evaluations.measure("validation", 0)
        context.detail(before=before)
        stopped = False
        try:
            ladder.hold(steps, lambda: f"at step {progress.step + 1}", come_back)
        except (LossNotFiniteError, MemoryExhaustedError):
            raise  # the weights have run away, or half of a step: the checkpoint is the better one
        except PatienceOverError:
            stopped = True
        except BaseException:
            scope.restore()
            if progress.step and scope.settled:
                save_checkpoint(run, job, scope, optimizer, progress.step)
            raise
        if stopped:
            save_checkpoint(run, job, scope, optimizer, progress.step)
            context.log(
                f"Stopped early at step {progress.step}: the dev loss has not improved on that of "
                f"step {evaluations.best_step} (patience {job.patience})"
            )
        after = evaluations.kept(progress.step)

    best_step, dev = evaluations.best_step, None
    if best_step is not None:
        dev = evaluations.measure("dev", best_step)
    eval_seconds, eval_passes = evaluations.cost
    rate = progress.step / progress.seconds if progress.seconds else None
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
                "suffix": job.suffix,
                "steps": progress.step,
                "stopped_early_at": progress.step if stopped else None,
                "lr": job.effective_lr,
                "seed": job.seed,
                "metric": data.task.metric,
                "before": before,
                "after": after,
                "kept": evaluations.keeps,
                "best_step": best_step,
                "dev": dev,
                "steps_per_second": rate,
                "forward_passes": progress.forward_passes,
                "eval_forward_passes": eval_passes,
                "tuned_parameters": scope.size,
                "changed": fmean(changed) if changed else None,
                "seconds": round(progress.seconds, 3),
                "eval_seconds": round(eval_seconds, 3),
                "data": data.source,
                "train_examples": len(training),
                "dev_examples": len(data.dev),
                "truncated": truncated,
            }
        ),
    )
    facts = {"run_id": run.run_id, "job": job.model_dump()}
    run.write_result("provenance.json", to_json(facts | provenance(loaded)))


def _encode(data: TaskData, loaded: LoadedModel, longest: int) -> dict[str, list[Example]]:
    """Tokenised rows by split, those of train as the loss needs them."""
    rows = {"train": data.train, "dev": data.dev, "validation": data.validation}
    return {
        split: encode_rows(data.task, part, loaded.tokenizer, longest, training=split == "train")
        for split, part in rows.items()
    }


def _choose_path(
    job: TuneJob, loaded: LoadedModel, selection: Selection, examples: list[Example]
) -> tuple[Forward, str]:
    if job.reference_only:
        return reference_forward(loaded), job.reference_only
    return choose_forward(
        loaded,
        job.path,
        selection.lowest,
        examples,
        chunk=min(CHUNK, job.batch_size),
        steps=job.steps,
        tuned=selection.parameters,
        suffix=job.suffix,
    )


def _ladders(
    job: TuneJob,
    run: Run,
    context: JobContext,
    forward: Forward,
    examples: dict[str, list[Example]],
) -> tuple[MemoryLadder, MemoryLadder]:
    """Those of the steps and of the evaluations; every rung is kept with the run.

    They begin on the highest rung, or where an interrupted run stood.
    """
    known = run.status().details
    sentences: list[str] = list(known.get("out_of_memory", []))

    def ladder(batch_size: int, detail: str, *splits: str) -> MemoryLadder:
        def said(sentence: str, micro_batch: int) -> None:
            sentences.append(sentence)
            context.detail(**{"out_of_memory": sentences, detail: micro_batch})
            context.log(sentence)

        rows = [examples[split] for split in splits]
        return MemoryLadder(forward, rows, batch_size, said, known.get(detail))

    return (
        ladder(job.batch_size, "micro_batch", "train"),
        ladder(min(CHUNK, job.batch_size), "eval_micro_batch", "dev", "validation"),
    )


def _fingerprint(
    loaded: LoadedModel, scope: TunedScope, examples: dict[str, list[Example]]
) -> dict[str, str]:
    """What a resumed run must find as it was, by the name it is called in the sentence."""
    return {
        f"{split} examples": digest((e.label, [c.tokens for c in e.candidates]) for e in rows)
        for split, rows in examples.items()
    } | {
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
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
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
