"""Zeroth-order optimizers: directions and projected gradients in, an update of the scope out.

Each is a function of (draws, g, lr) and its own float32 state, so that a ledger replays it. With
the gradient estimate ``d = 1/q sum_i g_i z_i``, the update is ``theta -= lr weight_decay theta``
and then ``theta -= lr u``:

* ``zo-sgd``: ``u = d`` (MeZO, Algorithm 1).
* ``momentum``: ``m = momentum m + d``, ``u = m`` (PyTorch's rule, no dampening).
* ``sign``: ``u = sign(d)`` (ZO-signSGD, Liu et al. 2019).
* ``conservative``: as zo-sgd; the trainer takes the step back if the batch loss rises (ZO-Bench).
* ``adamm``: ``m = beta1 m + (1 - beta1) d``, ``v = beta2 v + (1 - beta2) d^2``,
  ``v^ = max(v^, v)``, ``u = m / (sqrt(v^) + 1e-8)`` (ZO-AdaMM, Chen et al. 2019, Algorithm 1; zero
  initial state, no bias correction).

``adamw``, the first-order baseline, has the same shape in :mod:`zo_core.zo.first_order`.
"""

from collections.abc import Sequence

import torch

from zo_core.jobs import TuneJob
from zo_core.zo.scope import Draw, Terms, TunedScope

TINY = 1e-8
State = dict[str, torch.Tensor]


class ZoSgd:
    """Plain ZO-SGD: no state."""

    conservative = False

    def __init__(self, job: TuneJob) -> None:
        """Take the settings of a job."""
        self._job = job

    def state(self) -> State:
        """Float32 tensors that a checkpoint must keep, by name."""
        return {}

    def load(self, state: State) -> None:
        """Set the state from a checkpoint."""

    def update(
        self,
        scope: TunedScope,
        draws: Sequence[Draw],
        g: Sequence[float],
        lr: float,
        count: bool = False,
    ) -> int | None:
        """Step the scope; returns what :meth:`TunedScope.update` does."""

        def terms(name: str) -> Terms:
            return self._direction(scope, name, draws, g)

        return scope.update(terms, lr, self._job.weight_decay, count)

    def _direction(
        self, scope: TunedScope, name: str, draws: Sequence[Draw], g: Sequence[float]
    ) -> Terms:
        return [(value / len(g), scope.z(name, d)) for d, value in zip(draws, g, strict=True)]

    def _gradient(
        self, scope: TunedScope, name: str, draws: Sequence[Draw], g: Sequence[float]
    ) -> torch.Tensor:
        """``d`` of one parameter, a new float32 tensor of its shape."""
        total = torch.zeros_like(scope.z(name, draws[0]))
        for coefficient, z in ZoSgd._direction(self, scope, name, draws, g):
            total.add_(z, alpha=coefficient)
        return total


class Conservative(ZoSgd):
    """ZO-SGD whose steps the trainer takes back if they raise the batch loss."""

    conservative = True


class Sign(ZoSgd):
    """The sign of the gradient estimate."""

    def _direction(
        self, scope: TunedScope, name: str, draws: Sequence[Draw], g: Sequence[float]
    ) -> Terms:
        return [(1.0, self._gradient(scope, name, draws, g).sign_())]


class WithMoments(ZoSgd):
    """Keeps named moments of every parameter, zero at first."""

    moments: tuple[str, ...] = ()

    def __init__(self, job: TuneJob) -> None:
        """Take the settings of a job."""
        super().__init__(job)
        self._state: State = {}

    def state(self) -> State:
        """The moments, by ``<moment>:<parameter name>``."""
        return self._state

    def load(self, state: State) -> None:
        """Set the moments."""
        self._state = {name: tensor.clone() for name, tensor in state.items()}

    def _moment(self, moment: str, name: str, like: torch.Tensor) -> torch.Tensor:
        key = f"{moment}:{name}"
        if key not in self._state:
            self._state[key] = torch.zeros_like(like)
        elif self._state[key].device != like.device:
            self._state[key] = self._state[key].to(like.device)
        return self._state[key]


class Momentum(WithMoments):
    """Heavy-ball momentum on the gradient estimate."""

    def _direction(
        self, scope: TunedScope, name: str, draws: Sequence[Draw], g: Sequence[float]
    ) -> Terms:
        gradient = self._gradient(scope, name, draws, g)
        m = self._moment("m", name, gradient).mul_(self._job.momentum).add_(gradient)
        return [(1.0, m)]


class AdaMM(WithMoments):
    """ZO-AdaMM: Adam with the largest second moment so far."""

    def _direction(
        self, scope: TunedScope, name: str, draws: Sequence[Draw], g: Sequence[float]
    ) -> Terms:
        gradient = self._gradient(scope, name, draws, g)
        job = self._job
        m = self._moment("m", name, gradient).mul_(job.beta1).add_(gradient, alpha=1 - job.beta1)
        v = self._moment("v", name, gradient).mul_(job.beta2)
        v.addcmul_(gradient, gradient, value=1 - job.beta2)
        largest = self._moment("v_max", name, gradient)
        torch.maximum(largest, v, out=largest)
        return [(1.0, m / largest.sqrt().add_(TINY))]


OPTIMIZERS: dict[str, type[ZoSgd]] = {
    "zo-sgd": ZoSgd,
    "momentum": Momentum,
    "sign": Sign,
    "conservative": Conservative,
    "adamm": AdaMM,
}
