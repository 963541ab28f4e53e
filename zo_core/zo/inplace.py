"""The published way, on purpose: no master, weights moved in their own dtype.

MeZO's code does ``W += eps z``, ``W -= 2 eps z``, ``W += eps z``, ``W -= lr (g z + wd W)`` in the
working dtype, with z rounded to it. In fp16 and bf16 the weights then drift with every step, and
most small updates round away. This scope repeats that arithmetic, rounding for rounding, so that
its effect can be measured. The drift is part of the run: a replay walks through the same points.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from zo_core.zo.scope import BASE, NO_DECAY, Draw, Point, Terms, TunedScope


class InplaceScope(TunedScope):
    """A scope whose true weights are the working weights; for the reference path alone."""

    _at = BASE

    def _make_master(self) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in self.parameters.items()}

    def z(self, name: str, draw: Draw) -> torch.Tensor:
        """The perturbation of one parameter, rounded to the working dtype, as float32."""
        return super().z(name, draw).to(self.parameters[name].dtype).to(torch.float32)

    @torch.no_grad()
    def weights_at(self, name: str, point: Point) -> torch.Tensor:
        """One parameter moved from where the weights are now to a point; reads, moves nothing."""
        weights = self.parameters[name]
        if point == self._at:
            return weights
        if self._at.scale and point.scale and self._at.draw == point.draw:
            return self._moved(weights, name, point.draw, point.scale - self._at.scale)
        weights = self._moved(weights, name, self._at.draw, -self._at.scale)
        return self._moved(weights, name, point.draw, point.scale)

    def _moved(
        self, weights: torch.Tensor, name: str, draw: Draw | None, scale: float
    ) -> torch.Tensor:
        if draw is None or not scale:
            return weights
        return weights + self.z(name, draw).to(weights.dtype) * scale

    @torch.no_grad()
    def perturb(self, point: Point) -> None:
        """Move the weights to a point; they drift by its roundings."""
        super().perturb(point)
        if point.scale:
            self.settled = False
        self._at = point

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Within, the weights are those that the scope began with; there is no master to go by."""
        here = self.snapshot()
        self._set_working(self._base)
        try:
            yield
        finally:
            self._set_working(here)

    @torch.no_grad()
    def update(
        self,
        terms: Callable[[str], Terms],
        lr: float,
        weight_decay: float = 0.0,
        count: bool = False,
    ) -> int | None:
        """Move the weights back, then step in the working dtype: ``W -= lr (u + wd W)``."""
        self.restore()
        self.settled = True
        return super().update(terms, lr, weight_decay, count)

    def _step(self, name: str, terms: Terms, lr: float, weight_decay: float) -> None:
        weights = self.parameters[name]
        u = sum(tensor * coefficient for coefficient, tensor in terms)
        assert isinstance(u, torch.Tensor)
        u = u.to(weights.dtype)
        if weight_decay and not NO_DECAY.search(name):
            decayed = weights * self.masks[name] if name in self.masks else weights
            u = u + weight_decay * decayed
        weights.sub_(lr * u)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the weights from saved tensors."""
        self._at, self.settled = BASE, True
        super().load(tensors)

    def close(self) -> None:
        """Give the model back as it was before."""
        self._at, self.settled = BASE, True
        super().close()
