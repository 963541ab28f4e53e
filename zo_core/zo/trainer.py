"""The ZO-SGD training loop (MeZO, Algorithm 1), resumable to the bit.

A run is base weights plus its ledger: the ``step`` records in ``metrics.jsonl``. Batches and
perturbations are functions of (seed, step), so replaying the ledger's projected gradients rebuilds
the weights, and going on from there is the same as never having stopped.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.tasks.scoring import task_loss
from zo_core.tasks.templates import Example
from zo_core.zo.forward import Forward, Prepared
from zo_core.zo.scope import Draw, Point, TunedScope


class LossNotFiniteError(UserError):
    """The loss is NaN or infinite; the weights are those of the step before."""


@dataclass(slots=True)
class Progress:
    """Where a run stands. ``seconds`` and ``forward_passes`` leave evaluation out."""

    step: int = 0
    seconds: float = 0.0
    forward_passes: int = 0


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


def projected_gradient(
    forward: Forward, prepared: Prepared, scope: TunedScope, draw: Draw, eps: float
) -> tuple[float, float, float]:
    """Two-sided estimate ``g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)`` (Spall 1992).

    Leaves the working weights in an unspecified state: update or restore them next.

    Returns:
        (g, loss at +, loss at -).
    """
    pair = forward.logits_at(prepared, scope, (Point(draw, eps), Point(draw, -eps)))
    loss_plus, loss_minus = (float(task_loss(logits, prepared.scored)) for logits in pair)
    return (loss_plus - loss_minus) / (2 * eps), loss_plus, loss_minus


def train(
    job: TuneJob,
    forward: Forward,
    scope: TunedScope,
    examples: Sequence[Example],
    progress: Progress,
    on_step: Callable[[dict[str, Any]], None],
) -> None:
    """Run the steps that are left.

    Args:
        job: eps, lr, seed and so on.
        forward: how losses are computed.
        scope: what is tuned; holds the weights of ``progress.step``.
        examples: training rows.
        progress: updated in place.
        on_step: receives every ledger record once its update is applied; may raise to stop.

    Raises:
        LossNotFiniteError: see the class.
    """
    lr = job.effective_lr
    while progress.step < job.steps:
        began = time.perf_counter()
        step = progress.step + 1
        indices = batch_indices(job.seed, step, len(examples), job.batch_size)
        prepared = forward.prepare([examples[i] for i in indices])
        draw = Draw(job.noise, job.seed, step)
        g, loss_plus, loss_minus = projected_gradient(forward, prepared, scope, draw, job.eps)
        if not all(map(math.isfinite, (loss_plus, loss_minus, g))):
            scope.restore()
            raise LossNotFiniteError(
                f"The loss is not finite at step {step} (+: {loss_plus}, -: {loss_minus}): lower "
                f"lr or eps. The last checkpoint is kept, and the ledger up to step {step - 1}."
            )
        scope.update(draw, g, lr, job.weight_decay)
        progress.step = step
        progress.seconds += time.perf_counter() - began
        progress.forward_passes += 2
        on_step(
            {
                "kind": "step",
                "step": step,
                "loss": (loss_plus + loss_minus) / 2,
                "loss_plus": loss_plus,
                "loss_minus": loss_minus,
                "g": [g],
                "lr": lr,
                "seconds": round(progress.seconds, 4),
                "forward_passes": progress.forward_passes,
            }
        )


def replay(job: TuneJob, scope: TunedScope, records: Sequence[dict[str, Any]]) -> None:
    """Apply ledger records to a scope: no forward pass, the same bits.

    Args:
        job: noise, seed and weight decay.
        scope: holds the weights of the step before the first record.
        records: consecutive ``step`` records.
    """
    for record in records:
        (g,) = record["g"]
        scope.update(Draw(job.noise, job.seed, record["step"]), g, record["lr"], job.weight_decay)
