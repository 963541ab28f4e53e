"""Projected gradients from losses: the lines of MeZO's Algorithm 1 above the update.

For each of q directions z_i (Spall 1992; Nesterov and Spokoiny 2017):

* two-sided: ``g_i = (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps)``, 2 q forward passes;
* one-sided: ``g_i = (L(theta + eps z_i) - L(theta)) / eps``, q + 1 forward passes.

The gradient estimate is ``1/q sum_i g_i z_i``. L is the mean loss over the rows of all
micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from zo_core.tasks.scoring import task_loss
from zo_core.zo.reference import Forward, Prepared
from zo_core.zo.scope import BASE, Draw, Point, TunedScope


@dataclass(frozen=True, slots=True)
class Estimate:
    """Projected gradients with the losses they come from."""

    g: list[float]
    plus: list[float]
    """L(theta + eps z_i), nats."""
    minus: list[float]
    """L(theta - eps z_i), nats; empty if one-sided."""
    base: float | None
    """L(theta), nats, if it was asked for."""

    @property
    def losses(self) -> list[float]:
        """Every loss that was computed; their number is the number of forward passes."""
        return ([] if self.base is None else [self.base]) + self.plus + self.minus

    @property
    def loss(self) -> float:
        """What the curve shows: L(theta) if known, else the mean over all points."""
        return fmean(self.losses) if self.base is None else self.base


def points(
    draws: Sequence[Draw], eps: float, estimator: str, with_base: bool = False
) -> list[Point]:
    """The points of weight space that a step visits, in order."""
    one_sided = estimator == "one-sided"
    found = [BASE] if with_base or one_sided else []
    for draw in draws:
        found.append(Point(draw, eps))
        if not one_sided:
            found.append(Point(draw, -eps))
    return found


def losses_at(
    forward: Forward, batch: Sequence[Prepared], scope: TunedScope, where: Sequence[Point]
) -> list[float]:
    """Loss at every point, the mean over micro-batches weighted by their rows, in nats.

    Leaves the working weights in an unspecified state: update or restore them next.
    """
    totals = [0.0] * len(where)
    rows = 0
    for prepared in batch:
        count = len(prepared.scored.label)
        rows += count
        logits = forward.logits_at(prepared, scope, where)
        for first in range(0, len(where), 2):  # a pair at a time: float32 takes more memory
            losses = task_loss(logits[first : first + 2], prepared.scored).tolist()
            for i, loss in enumerate(losses, first):
                totals[i] += loss * count
    return [total / rows for total in totals]


def estimate(
    forward: Forward,
    batch: Sequence[Prepared],
    scope: TunedScope,
    draws: Sequence[Draw],
    eps: float,
    estimator: str = "two-sided",
    with_base: bool = False,
) -> Estimate:
    """Projected gradient of every direction.

    Leaves the working weights in an unspecified state: update or restore them next.

    Args:
        forward: how losses are computed.
        batch: the micro-batches.
        scope: what is tuned.
        draws: the q directions.
        eps: perturbation scale.
        estimator: ``two-sided`` or ``one-sided``.
        with_base: whether L(theta) is wanted even where the estimate does not need it.
    """
    where = points(draws, eps, estimator, with_base)
    losses = losses_at(forward, batch, scope, where)
    base = losses.pop(0) if where[0] == BASE else None
    if estimator == "one-sided":
        assert base is not None
        return Estimate([(plus - base) / eps for plus in losses], losses, [], base)
    plus, minus = losses[::2], losses[1::2]
    g = [(p - m) / (2 * eps) for p, m in zip(plus, minus, strict=True)]
    return Estimate(g, plus, minus, base)
