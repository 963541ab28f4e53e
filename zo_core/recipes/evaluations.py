"""The evaluations of a tuning run: dev and validation outcomes, the best step, when to stop.

Dev rows are evaluated every ``eval_every`` steps and after the last one, and choose the step whose
weights are kept; validation rows are evaluated before the first step and once more with the kept
weights. The base weights take part as step 0: a run that never improves on them keeps them. Their
dev loss is measured at the first dev evaluation, by setting them back for a moment, so that the
first step does not wait for it.

An evaluation that runs out of memory goes down a ladder of its own
(:mod:`zo_core.zo.out_of_memory`): it is begun again with smaller batches, the later ones keep to
them, also in a resumed run, and no bit of the training changes.

The record of a dev evaluation comes first and ``best.safetensors`` follows it. A kill between the
two leaves an older file, which a resumed run replaces: from the weights that it comes back to, or
from the ledger.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from zo_core.jobs import Keep, TuneJob
from zo_core.models.load import LoadedModel
from zo_core.progress import JobContext
from zo_core.runs import Run
from zo_core.tasks.catalog import METRIC_NAMES, TaskInfo
from zo_core.tasks.evaluate import METRICS, evaluate
from zo_core.tasks.templates import Example
from zo_core.zo.checkpoint import BEST, read_checkpoint, rebuild, save_best, step_of
from zo_core.zo.first_order import AdamW
from zo_core.zo.optimizers import ZoSgd
from zo_core.zo.out_of_memory import MemoryLadder
from zo_core.zo.reference import Forward
from zo_core.zo.scope import TunedScope
from zo_core.zo.trainer import make_optimizer

Outcome = dict[str, Any]


class Evaluations:
    """What was evaluated so far; every outcome is recorded once, also over a resume."""

    def __init__(
        self,
        job: TuneJob,
        run: Run,
        context: JobContext,
        task: TaskInfo,
        loaded: LoadedModel,
        forward: Forward,
        ladder: MemoryLadder,
        scope: TunedScope,
        examples: Mapping[str, Sequence[Example]],
        keep: Callable[[dict[str, Any]], None],
        records: Sequence[dict[str, Any]],
    ) -> None:
        """Take up what the records say.

        Args:
            job: eval_every, keep, patience.
            run: holds the best weights.
            context: told about progress.
            task: says how rows are evaluated.
            loaded: the model.
            forward: the path that scores.
            ladder: that of the evaluations; says how many examples a forward pass can take.
            scope: what is tuned.
            examples: split -> rows; no dev rows mean no dev evaluation.
            keep: receives every new record.
            records: metric records so far.
        """
        self._job, self._run, self._context, self._task = job, run, context, task
        self._loaded, self._forward, self._scope = loaded, forward, scope
        self._ladder = ladder
        self._examples, self._keep = examples, keep
        self._known = {(r["split"], r["step"]): r for r in records if r["kind"] == "eval"}
        self._at = 0
        """The step that progress is shown of."""
        best = self.best_step
        self._saved = best if step_of(run.path / BEST) == best else None
        """The best step if the file holds its weights, else None."""

    @property
    def _dev(self) -> dict[int, float]:
        """Step -> dev loss; a loss that is not a number counts as infinite."""
        return {
            step: float("inf") if record["loss"] is None else record["loss"]
            for (split, step), record in sorted(self._known.items())
            if split == "dev"
        }

    @property
    def best_step(self) -> int | None:
        """The step of the smallest dev loss, the earlier one of equals; None before the first."""
        return _best(self._dev)

    @property
    def cost(self) -> tuple[float, int]:
        """Seconds and forward passes of all evaluations."""
        records = self._known.values()
        seconds = sum(r.get("eval_seconds", 0.0) for r in records)
        return seconds, sum(r.get("eval_forward_passes", 0) for r in records)

    def due(self, step: int) -> bool:
        """Whether the dev rows are evaluated after a step."""
        every = self._job.eval_every
        if not (every and step and self._examples["dev"]):
            return False
        return step % every == 0 or step == self._job.steps

    def look(self, step: int) -> bool:
        """Evaluate the dev rows if it is time, and keep the weights if they are the best.

        Args:
            step: the step that the scope holds the weights of.

        Returns:
            Whether patience is used up.
        """
        self._at = step
        if not self.due(step):
            return False
        self.measure("dev", 0)
        self.measure("dev", step)
        self._keep_best(step)
        losses = {s: loss for s, loss in self._dev.items() if s <= step}
        best, patience = _best(losses), self._job.patience
        assert best is not None
        return bool(patience) and sum(s > best for s in losses) >= patience

    def measure(self, split: str, step: int) -> Outcome:
        """Recall what was found at a step, or evaluate now.

        Args:
            split: dev or validation.
            step: 0, or the step that the scope holds the weights of.
        """
        if (split, step) not in self._known:
            rows = self._examples[split]

            def tick(done: int) -> None:
                message = f"evaluating: {done} of {len(rows)} {split} rows"
                self._context.progress(self._at, self._job.steps, message)
                self._context.check_cancelled()

            began = time.perf_counter()
            away = step == 0 and self._at > 0

            def attempt() -> dict[str, float | int]:
                size = self._ladder.micro_batch
                with self._scope.at_base() if away else nullcontext():
                    return evaluate(self._task, self._loaded, self._forward, rows, size, tick)

            found = self._ladder.hold(attempt, lambda: f"in an evaluation at step {self._at}")
            passes = found.pop("forward_passes")
            record = {"kind": "eval", "step": step, "split": split, **found}
            record["eval_seconds"] = round(time.perf_counter() - began, 4)
            record["eval_forward_passes"] = passes
            self._keep(record)
            self._known[split, step] = record
            metric = self._task.metric
            self._context.log(
                f"step {step}: {split} {METRIC_NAMES[metric]} {found[metric]:.4f}, "
                f"loss {found['loss']:.4f} ({found['examples']} rows)"
            )
        record = self._known[split, step]
        return {name: record[name] for name in METRICS if name in record}

    def resume(self, optimizer: ZoSgd, at: int, records: Sequence[dict[str, Any]]) -> None:
        """Mend ``best.safetensors`` if it is not what the records call the best.

        Args:
            optimizer: of the run.
            at: the step that the scope holds the weights of.
            records: metric records so far.
        """
        self._at = at
        self._keep_best(at)
        best = self.best_step
        if self._job.keep == "last" or best in (None, self._saved):
            return
        assert best is not None
        if not isinstance(optimizer, AdamW):
            here = {name: tensor.cpu() for name, tensor in self._scope.snapshot().items()}
            steps = [r for r in records if r["kind"] == "step"][:best]
            rebuild(self._job, self._scope, make_optimizer(self._job), steps)
            self._keep_best(best)
            self._scope.load(here)
        elif best <= at:
            self._context.log(f"The best weights, of step {best}, are lost: the next best count")
            self._known = {
                (split, step): record
                for (split, step), record in self._known.items()
                if split != "dev" or not 0 < step <= at
            }
            self._keep_best(at)

    @property
    def keeps(self) -> Keep:
        """Which weights the run keeps: the best only where dev rows were evaluated."""
        return "last" if self.best_step is None else self._job.keep

    def kept(self, last: int) -> Outcome:
        """The validation outcome of the kept weights; the scope holds those of the last step."""
        best = self.best_step
        step = last if best is None or self.keeps == "last" else best
        self._at = last
        if step != last and ("validation", step) not in self._known:
            self._scope.load(read_checkpoint(self._run.path / BEST).weights)
        return self.measure("validation", step)

    def _keep_best(self, step: int) -> None:
        """Write the best weights if they are not in the file yet and at hand.

        Args:
            step: the step that the scope holds the weights of.
        """
        best = self.best_step
        if self._job.keep == "last" or best is None or best == self._saved:
            return
        if best not in (0, step):
            return
        tensors = self._scope.master if best == step else self._scope.base
        save_best(self._run, self._job, tensors, best)
        self._saved = best


def _best(losses: Mapping[int, float]) -> int | None:
    return min(losses, key=lambda step: (losses[step], step)) if losses else None
