"""The training loop (MeZO, Algorithm 1, with any optimizer here), resumable to the bit.

A zeroth-order run is base weights plus its ledger: the ``step`` records in ``metrics.jsonl``.
Batches and perturbations are functions of (seed, step), so replaying the ledger's projected
gradients rebuilds the weights, and going on from there is the same as never having stopped.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from zo_core.errors import NOT_FINITE, UserError
from zo_core.jobs import TuneJob
from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import batches
from zo_core.tasks.templates import Example
from zo_core.zo.estimator import estimate, losses_at, points
from zo_core.zo.first_order import AdamW, gradients_of
from zo_core.zo.forward import FastForward
from zo_core.zo.fused import FusedSteps, Queued
from zo_core.zo.inplace import InplaceScope
from zo_core.zo.optimizers import OPTIMIZERS, ZoSgd
from zo_core.zo.reference import Forward, Prepared
from zo_core.zo.schedule import learning_rate
from zo_core.zo.scope import BASE, Draw, TunedScope
from zo_core.zo.scopes import Selection

COUNT_EVERY = 100
"""Steps between counts of the weights that an update changed; the first steps are denser."""


class LossNotFiniteError(UserError):
    """The loss is NaN or infinite; the weights are those of the step before."""


@dataclass(slots=True)
class Progress:
    """Where a run stands. ``seconds`` and ``forward_passes`` leave evaluation out."""

    step: int = 0
    seconds: float = 0.0
    forward_passes: int = 0


def make_scope(job: TuneJob, selection: Selection) -> TunedScope:
    """The scope of a job, in the precision it asks for."""
    kind = InplaceScope if job.precision == "inplace" else TunedScope
    return kind(selection.parameters, selection.masks)


def make_optimizer(job: TuneJob) -> ZoSgd:
    """The optimizer of a job, without any state yet."""
    return AdamW(job) if job.optimizer == "adamw" else OPTIMIZERS[job.optimizer](job)


def batch_indices(seed: int, step: int, count: int, batch_size: int) -> list[int]:
    """Indices of a step's batch: a fresh permutation every epoch, a short last batch dropped.

    Args:
        seed: the run's seed.
        step: counted from 1.
        count: examples in the data set.
        batch_size: examples a batch; more than ``count`` means all of them.
    """
    size = min(batch_size, count)
    epoch, place = divmod(step - 1, count // size)
    generator = torch.Generator().manual_seed((seed << 24) + epoch)
    order = torch.randperm(count, generator=generator)
    return order[place * size : (place + 1) * size].tolist()


def draws_of(job: TuneJob, step: int) -> list[Draw]:
    """The directions of a step."""
    return [Draw(job.noise, job.seed, step, i) for i in range(job.directions)]


def train(
    job: TuneJob,
    loaded: LoadedModel,
    forward: Forward,
    scope: TunedScope,
    optimizer: ZoSgd,
    examples: Sequence[Example],
    progress: Progress,
    on_step: Callable[[dict[str, Any]], None],
    looks: Callable[[int], bool] = lambda _step: True,
    micro_batch: int | None = None,
) -> None:
    """Run the steps that are left.

    Args:
        job: eps, lr, seed and so on.
        loaded: the model that ``forward`` runs.
        forward: how losses are computed.
        scope: what is tuned; holds the weights of ``progress.step``.
        optimizer: holds the state of ``progress.step``.
        examples: training rows.
        progress: updated in place.
        on_step: receives every ledger record once its update is applied; may raise to stop.
        looks: whether ``on_step`` looks at the weights of a step, or needs them to stay. On a GPU
            further steps are queued behind those where it does not.
        micro_batch: most examples that a forward pass may hold; None: ``batch_size``. Losses are
            means over the whole batch all the same.

    Raises:
        LossNotFiniteError: see the class.
    """
    most = min(job.batch_size, micro_batch or job.batch_size)
    whole = most == job.batch_size
    if whole and isinstance(forward, FastForward) and FusedSteps.apply_to(job, scope):
        _train_queued(job, forward, scope, examples, progress, on_step, looks)
        return
    while progress.step < job.steps:
        began = time.perf_counter()
        step = progress.step + 1
        rows = batch_indices(job.seed, step, len(examples), job.batch_size * job.accumulate)
        batch = _MicroBatches(forward, [examples[i] for i in rows], most)
        if isinstance(optimizer, AdamW):
            found, passes = _first_order_step(job, loaded, forward, scope, optimizer, batch, step)
        else:
            found, passes = _zeroth_order_step(job, forward, scope, optimizer, batch, step)
        passes *= -(-len(rows) // job.batch_size)  # a pass that is split still counts once
        on_step(_advance(progress, step, time.perf_counter() - began, passes, found))


class _MicroBatches(Sequence[Prepared]):
    """The micro-batches of a step. Of several, one at a time is laid out on the device."""

    def __init__(self, forward: Forward, examples: Sequence[Example], most: int) -> None:
        self._forward, self.rows = forward, len(examples)
        self._parts = [[examples[i] for i in part] for part in batches(len(examples), most)]
        self._only = forward.prepare(self._parts[0]) if len(self._parts) == 1 else None

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, which: Any) -> Any:
        part = self._parts[which]
        return self._only or self._forward.prepare(part)


def _advance(
    progress: Progress, step: int, seconds: float, passes: int, found: dict[str, Any]
) -> dict[str, Any]:
    """Count a step, and its record for the ledger."""
    progress.step = step
    progress.seconds += seconds
    progress.forward_passes += passes
    return {
        "kind": "step",
        "step": step,
        **found,
        "seconds": round(progress.seconds, 4),
        "forward_passes": progress.forward_passes,
    }


def _train_queued(
    job: TuneJob,
    forward: FastForward,
    scope: TunedScope,
    examples: Sequence[Example],
    progress: Progress,
    on_step: Callable[[dict[str, Any]], None],
    looks: Callable[[int], bool],
) -> None:
    """The same with one step ahead of the host; see :class:`FusedSteps`."""
    steps = FusedSteps(forward, scope, job.eps)
    queue: deque[Queued] = deque()
    launched = progress.step
    began = time.perf_counter()

    def settle() -> dict[str, Any]:
        nonlocal began
        queued = queue.popleft()
        g, plus, minus, changed = queued.read()
        _check_finite(scope, queued.step, (plus, minus, g))
        record = {"loss": (plus + minus) / 2, "loss_plus": plus, "loss_minus": minus, "g": [g]}
        record["lr"] = queued.lr
        if _counts(queued.step):
            record["changed"] = changed / scope.size
        now = time.perf_counter()
        seconds, began = now - began, now
        return _advance(progress, queued.step, seconds, 2, record)

    try:
        while progress.step < job.steps:
            while launched < job.steps and len(queue) < 2 and not (queue and looks(launched)):
                launched += 1
                rows = batch_indices(job.seed, launched, len(examples), job.batch_size)
                prepared = forward.prepare([examples[i] for i in rows])
                (draw,) = draws_of(job, launched)
                lr = learning_rate(job, launched)
                queue.append(steps.launch(prepared, draw, lr, looks(launched), _counts(launched)))
            record = settle()
            on_step(record)
            if looks(progress.step):
                began = time.perf_counter()
    except LossNotFiniteError:
        raise  # later steps left the weights alone
    except BaseException:
        while queue:  # these steps have changed the weights: they belong to the ledger
            record = settle()
            with suppress(Exception):
                on_step(record)
        raise
    finally:
        steps.settle()


def _zeroth_order_step(
    job: TuneJob,
    forward: Forward,
    scope: TunedScope,
    optimizer: ZoSgd,
    batch: Sequence[Prepared],
    step: int,
) -> tuple[dict[str, Any], int]:
    """Estimate, update, and what the ledger keeps of it; the forward passes of a micro-batch."""
    draws = draws_of(job, step)
    found = estimate(
        forward, batch, scope, draws, job.eps, job.estimator, with_base=optimizer.conservative
    )
    _check_finite(scope, step, found.losses + found.g)
    lr = learning_rate(job, step)
    passes = len(found.losses)
    saved = None
    if optimizer.conservative:
        scope.restore()
        saved = scope.snapshot()
    changed = optimizer.update(scope, draws, found.g, lr, _counts(step))
    record: dict[str, Any] = {
        "loss": found.loss,
        "loss_plus": fmean(found.plus),
        "loss_minus": fmean(found.minus) if found.minus else None,
        "g": found.g,
        "lr": lr,
    }
    if len(batch) > 1:
        record["micro_batches"] = len(batch)
    if saved is not None:
        assert found.base is not None
        (after,) = losses_at(forward, batch, scope, [BASE])
        passes += 1
        record["accepted"] = after <= found.base
        if not record["accepted"]:
            scope.load(saved)
    if changed is not None:
        record["changed"] = changed / scope.size
    return record, passes


def _first_order_step(
    job: TuneJob,
    loaded: LoadedModel,
    forward: Forward,
    scope: TunedScope,
    optimizer: AdamW,
    batch: "_MicroBatches",
    step: int,
) -> tuple[dict[str, Any], int]:
    """Gradient, update, and what the metrics keep of it; the forward passes of a micro-batch."""
    loss, gradients = gradients_of(loaded, forward, batch, scope, batch.rows)
    norm = math.sqrt(sum(float(d.square().sum(dtype=torch.float64)) for d in gradients.values()))
    _check_finite(scope, step, [loss, norm])
    lr = learning_rate(job, step)
    changed = optimizer.step(scope, gradients, step, lr, _counts(step))
    record: dict[str, Any] = {"loss": loss, "gradient_norm": norm, "g": [], "lr": lr}
    if changed is not None:
        record["changed"] = changed / scope.size
    return record, 1


def _counts(step: int) -> bool:
    """Whether a step counts the weights that it changes: powers of two and every hundredth."""
    return step & (step - 1) == 0 or step % COUNT_EVERY == 0


def _check_finite(scope: TunedScope, step: int, values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        scope.restore()
        raise LossNotFiniteError(
            f"{NOT_FINITE} at step {step} (losses and g: "
            f"{', '.join(f'{v:g}' for v in values[:6])}): lower lr or eps. The last checkpoint is "
            f"kept, and the ledger up to step {step - 1}."
        )


def replay(
    job: TuneJob, scope: TunedScope, optimizer: ZoSgd, records: Sequence[dict[str, Any]]
) -> None:
    """Apply ledger records to a scope: no forward pass, the same bits.

    Args:
        job: noise, seed, optimizer and so on.
        scope: holds the weights of the step before the first record.
        optimizer: holds the state of that step.
        records: consecutive ``step`` records of a zeroth-order run.
    """
    for record in records:
        draws = draws_of(job, record["step"])
        if isinstance(scope, InplaceScope):
            where = points(draws, job.eps, job.estimator, with_base=optimizer.conservative)
            for point in where * record.get("micro_batches", 1):
                scope.perturb(point)
        if record.get("accepted", True):
            optimizer.update(scope, draws, record["g"], record["lr"])
        else:
            scope.restore()
    scope.forget()
