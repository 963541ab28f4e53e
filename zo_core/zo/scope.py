"""Scope: the set of tuned parameters, and its fp32 master.

The working weights may be bf16 or fp16, where ``+eps z, -2 eps z, +eps z`` drifts and small updates
round away. So the scope keeps the weights' true values in float32, and every perturbed, restored
or updated working weight is one rounding of a float32 expression of them:

* perturb:  ``W = round(master + scale z)``
* restore:  ``W = round(master)`` - exact, bit for bit
* update:   ``master -= lr (u + weight_decay master)``, then restore; u is the optimizer's direction

A masked parameter is tuned inside its mask alone: z and u are 0 outside, and inside they are what
they would be without a mask. :class:`zo_core.zo.inplace.InplaceScope` does without a master.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zo_core.errors import UserError
from zo_core.models.load import LoadedModel
from zo_core.models.memory import NOISE_BOUND
from zo_core.zo.noise import perturbation, sphere_factor

NO_DECAY = re.compile(r"bias|norm|ln_", re.IGNORECASE)
"""Parameters that weight decay leaves alone: biases and every kind of norm."""

TUNABLE = (torch.float32, torch.bfloat16, torch.float16)

Terms = Sequence[tuple[float, torch.Tensor]]
"""A direction as a sum of coefficient x float32 tensor: often z itself, which needs no copy."""


def check_layer(layer: int, count: int, model: str) -> int:
    """The layer, if a model of ``count`` layers has it.

    Raises:
        UserError: it is out of range.
    """
    if not 0 <= layer < count:
        raise UserError(f"Layer {layer} is out of range: {model} has layers 0 to {count - 1}.")
    return layer


def scope_parameters(loaded: LoadedModel, layer: int | None) -> dict[str, torch.Tensor]:
    """Name -> working weight of a scope: one decoder layer, or the full model for None.

    Raises:
        UserError: there is no such layer, or its weights are quantised.
    """
    prefix = ""
    if layer is not None:
        prefix = f"{loaded.decoder.prefix}.{check_layer(layer, len(loaded.decoder), loaded.name)}."
    return tunable(
        {n: p for n, p in loaded.model.named_parameters() if n.startswith(prefix)},
    )


def tunable(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same parameters, once it is sure that they can be perturbed.

    Raises:
        UserError: one is quantised.
    """
    for name, parameter in parameters.items():
        if parameter.dtype not in TUNABLE:
            raise UserError(
                f"scope: {name} is stored as {str(parameter.dtype).removeprefix('torch.')}: only "
                "float32, bfloat16 and float16 weights can be perturbed."
            )
    return parameters


@dataclass(frozen=True, slots=True)
class Draw:
    """What determines a perturbation, apart from the parameter."""

    noise: str
    seed: int
    step: int
    direction: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """A point of weight space: the scope's true weights plus ``scale z``."""

    draw: Draw | None
    scale: float

    def __post_init__(self) -> None:
        """A point off the base needs a direction."""
        assert self.draw is not None or not self.scale


BASE = Point(None, 0.0)
"""The unperturbed weights."""


class TunedScope:
    """Working weights of a scope with their fp32 master. ``close`` leaves the model as it was."""

    settled = True
    """Whether the true weights are those of the last update; see InplaceScope."""

    def __init__(
        self,
        parameters: dict[str, torch.Tensor],
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Take charge of the weights.

        Args:
            parameters: name -> working weight, changed in place from now on.
            masks: name -> bool tensor of the parameter's shape, true at tuned entries; parameters
                that are not named are tuned whole.
        """
        self.parameters = parameters
        self.masks = dict(masks or {})
        self.master = self._make_master()
        self._base = {n: p.detach().clone() for n, p in parameters.items()}
        self.size = sum(
            int(self.masks[n].sum()) if n in self.masks else p.numel()
            for n, p in parameters.items()
        )
        self._noise: dict[tuple[str, Draw], torch.Tensor] = {}
        self._held = 0
        self._held_step: tuple[str, int, int] | None = None
        self._factors: dict[Draw, float] = {}

    def _make_master(self) -> dict[str, torch.Tensor]:
        return {
            n: p.detach().to(torch.float32, copy=True).contiguous()
            for n, p in self.parameters.items()
        }

    def z(self, name: str, draw: Draw) -> torch.Tensor:
        """The perturbation of one parameter, float32, 0 outside its mask; not to be written to.

        Draws of one step are kept as far as ``NOISE_BOUND`` allows.
        """
        if self._held_step != (draw.noise, draw.seed, draw.step):
            self.forget()
            self._held_step = (draw.noise, draw.seed, draw.step)
        if (name, draw) in self._noise:
            return self._noise[name, draw]
        z = self._direction(name, draw)
        if draw.noise == "sphere":
            if draw not in self._factors:
                raw = (self._direction(n, draw) for n in self.parameters)
                self._factors[draw] = sphere_factor(raw, self.size)
            z.mul_(self._factors[draw])
        if self._held + z.numel() <= NOISE_BOUND:
            self._noise[name, draw] = z
            self._held += z.numel()
        return z

    def forget(self) -> None:
        """Free the perturbations that are kept."""
        self._noise, self._held, self._factors = {}, 0, {}
        self._held_step = None

    def _direction(self, name: str, draw: Draw) -> torch.Tensor:
        parameter = self.parameters[name]
        z = perturbation(
            draw.noise,
            draw.seed,
            draw.step,
            name,
            parameter.shape,
            parameter.device,
            draw.direction,
        )
        return z.mul_(self.masks[name]) if name in self.masks else z

    @torch.no_grad()
    def weights_at(self, name: str, point: Point) -> torch.Tensor:
        """One parameter at a point, in the working dtype; not to be written to."""
        weights = self.master[name]
        if point.draw is not None and point.scale:
            weights = torch.add(weights, self.z(name, point.draw), alpha=point.scale)
        return weights.to(self.parameters[name].dtype)

    @torch.no_grad()
    def perturb(self, point: Point) -> None:
        """Set the working weights to those of a point."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights_at(name, point))

    def restore(self) -> None:
        """Set the working weights to the master, exactly."""
        self.perturb(BASE)

    @torch.no_grad()
    def update(
        self,
        terms: Callable[[str], Terms],
        lr: float,
        weight_decay: float = 0.0,
        count: bool = False,
    ) -> int | None:
        """Step against a direction and restore the working weights.

        ``master -= lr weight_decay master`` (decoupled, not for :data:`NO_DECAY`), then
        ``master -= lr u``.

        Args:
            terms: parameter name -> the direction u.
            lr: learning rate.
            weight_decay: decoupled weight decay.
            count: whether to count the weights that change.

        Returns:
            How many weights changed in the working dtype; None if they were not counted.
        """
        changed = 0
        for name, parameter in self.parameters.items():
            master = self.master[name]
            before = master.to(parameter.dtype, copy=True) if count else None
            self._step(name, terms(name), lr, weight_decay)
            parameter.copy_(master)
            if before is not None:
                changed += int((parameter != before).sum())
        return changed if count else None

    def _step(self, name: str, terms: Terms, lr: float, weight_decay: float) -> None:
        master = self.master[name]
        if weight_decay and not NO_DECAY.search(name):
            if name in self.masks:
                master.sub_(master * self.masks[name], alpha=lr * weight_decay)
            else:
                master.mul_(1.0 - lr * weight_decay)
        for coefficient, tensor in terms:
            master.add_(tensor, alpha=-lr * coefficient)

    @property
    def base(self) -> dict[str, torch.Tensor]:
        """The true weights that the scope began with, by parameter name, in host memory."""
        return {n: t.cpu().to(self.master[n].dtype) for n, t in self._base.items()}

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Within, the working weights are those that the scope began with."""
        self._set_working(self._base)
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def _set_working(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    @torch.no_grad()
    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of the true weights, by parameter name."""
        return {name: tensor.clone() for name, tensor in self.master.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the true and the working weights from saved tensors.

        Raises:
            UserError: names or shapes are not this scope's.
        """
        shapes = {n: tuple(m.shape) for n, m in self.master.items()}
        if {n: tuple(t.shape) for n, t in tensors.items()} != shapes:
            raise UserError("The checkpoint does not belong to this scope: its tensors differ.")
        for name, master in self.master.items():
            master.copy_(tensors[name])
        self.restore()

    @torch.no_grad()
    def close(self) -> None:
        """Give the model back as it was before."""
        self._set_working(self._base)
