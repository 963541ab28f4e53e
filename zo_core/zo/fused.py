"""ZO-SGD steps queued on a GPU: nothing waits for the host, the ledger is read a step later.

The projected gradient goes from the losses to the update on the device, in the arithmetic of the
loop that waits (:mod:`zo_core.zo.trainer`): float64 for g and ``-lr g``, one rounding to float32.
Perturbation and update are the fused kernels of :mod:`zo_core.zo.kernels.noise`. A loss that is not
finite freezes the weights on the device from that step on, until the host hears of it.
"""

from dataclasses import dataclass

import torch

from zo_core.jobs import TuneJob
from zo_core.tasks.scoring import task_loss
from zo_core.zo.forward import FastForward
from zo_core.zo.points import Owed, fusible, step_along
from zo_core.zo.reference import Prepared
from zo_core.zo.scope import Draw, Point, TunedScope


@dataclass(frozen=True, slots=True)
class Queued:
    """A step whose results are on their way."""

    step: int
    lr: float
    values: torch.Tensor
    """float64 [4], pinned: g, the losses at plus and minus, changed weights; once ``arrived``."""
    arrived: torch.cuda.Event

    def read(self) -> tuple[float, float, float, int]:
        """Wait for the results: g, loss at plus, loss at minus, changed weights (if counted)."""
        self.arrived.synchronize()
        g, plus, minus, changed = self.values.tolist()
        return g, plus, minus, int(changed)


class FusedSteps:
    """Launches ZO-SGD steps: one direction, two-sided, no weight decay, no micro-batches."""

    @staticmethod
    def apply_to(job: TuneJob, scope: TunedScope) -> bool:
        """Whether a job's steps can be queued."""
        return (
            job.optimizer == "zo-sgd"
            and job.estimator == "two-sided"
            and job.directions == job.accumulate == 1
            and not job.weight_decay
            and fusible(scope, job.noise)
        )

    def __init__(self, forward: FastForward, scope: TunedScope, eps: float) -> None:
        """Take charge of a scope on a GPU.

        Args:
            forward: the fast path.
            scope: see :func:`fusible`.
            eps: perturbation scale.
        """
        self._forward, self._scope, self._eps = forward, scope, eps
        device = next(iter(scope.parameters.values())).device
        self._none = torch.zeros((), dtype=torch.float64, device=device)
        """Changed weights of a step that does not count them."""
        self._sound = torch.ones((), dtype=torch.float64, device=device)
        """1; NaN from the first g on that is not finite."""
        self._owed: Owed | None = None

    @torch.no_grad()
    def launch(
        self, prepared: Prepared, draw: Draw, lr: float, settle: bool = True, count: bool = False
    ) -> Queued:
        """Queue a step.

        Args:
            prepared: the batch.
            draw: its direction.
            lr: its learning rate.
            settle: whether somebody will look at the weights after it. If not, its update waits for
                the next step, whose perturbation reads the master anyway.
            count: whether to count the weights that it changes.
        """
        scope = self._scope
        points = (Point(draw, self._eps), Point(draw, -self._eps))
        pair = self._forward.logits_at(prepared, scope, points, self._owed)
        self._owed = None
        plus, minus = task_loss(pair, prepared.scored).double()
        g = (plus - minus) / (2 * self._eps)
        self._sound.add_(g, alpha=0)
        alpha = (g * -lr * self._sound).nan_to_num(nan=0.0).float()
        before = (
            {n: scope.master[n].to(p.dtype, copy=True) for n, p in scope.parameters.items()}
            if count
            else {}
        )
        self._owed = Owed(draw, alpha)
        if settle or count or not self._forward.pairs(scope):
            self.settle()
        changed = self._none
        for name, weights in before.items():
            changed = changed + (scope.parameters[name] != weights).sum()
        values = torch.empty(4, dtype=torch.float64, pin_memory=True)
        values.copy_(torch.stack((g, plus, minus, changed)), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Queued(draw.step, lr, values, arrived)

    def settle(self) -> None:
        """Queue the update that waits, if one does: then master and working weights are true."""
        if self._owed is None:
            return
        if self._owed.paid:  # by a step that broke off afterwards
            self._scope.restore()
        else:
            step_along(self._scope, self._owed.draw, self._owed.alpha)
        self._owed = None
