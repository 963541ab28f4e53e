"""Scope: the set of tuned parameters, and its fp32 master.

The working weights may be bf16 or fp16, where ``+eps z, -2 eps z, +eps z`` drifts and small updates
round away. So the scope keeps the weights' true values in float32, and every perturbed, restored
or updated working weight is one rounding of a float32 expression of them:

* perturb:  ``W = round(master + sign eps z)``
* restore:  ``W = round(master)`` - exact, bit for bit
* update:   ``master -= lr (g z + weight_decay master)``, then restore (MeZO, Algorithm 1)
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from zo_core.errors import UserError
from zo_core.models.load import LoadedModel
from zo_core.models.memory import NOISE_BOUND
from zo_core.zo.noise import key, perturbation

NO_DECAY = re.compile(r"bias|norm|ln_", re.IGNORECASE)
"""Parameters that weight decay leaves alone: biases and every kind of norm."""

TUNABLE = (torch.float32, torch.bfloat16, torch.float16)


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
    chosen: dict[str, torch.Tensor] = {
        n: p for n, p in loaded.model.named_parameters() if n.startswith(prefix)
    }
    for name, parameter in chosen.items():
        if parameter.dtype not in TUNABLE:
            raise UserError(
                f"scope: {name} is stored as {str(parameter.dtype).removeprefix('torch.')}: only "
                "float32, bfloat16 and float16 weights can be perturbed."
            )
    return chosen


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

    draw: Draw
    scale: float

    @property
    def opposite(self) -> "Point":
        """The point on the other side."""
        return Point(self.draw, -self.scale)


class TunedScope:
    """Working weights of a scope with their fp32 master. ``close`` leaves the model as it was."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        """Take charge of the weights.

        Args:
            parameters: name -> working weight, changed in place from now on.
        """
        self.parameters = parameters
        self.master = {
            n: p.detach().to(torch.float32, copy=True).contiguous() for n, p in parameters.items()
        }
        self._base = {n: p.detach().clone() for n, p in parameters.items()}
        self.size = sum(p.numel() for p in parameters.values())
        self._keep_noise = self.size <= NOISE_BOUND
        self._noise: dict[str, torch.Tensor] = {}
        self._noise_of: Draw | None = None
        self._keys_of: Draw | None = None
        self._keys_there = torch.empty(0)

    def z(self, name: str, draw: Draw) -> torch.Tensor:
        """The perturbation of one parameter; small scopes keep it for the length of a step."""
        if self._noise_of != draw:
            self._noise, self._noise_of = {}, draw
        if name in self._noise:
            return self._noise[name]
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
        if self._keep_noise:
            self._noise[name] = z
        return z

    @torch.no_grad()
    def weights_at(self, name: str, point: Point) -> torch.Tensor:
        """One parameter's working weights at a point: ``master + scale z``, rounded once."""
        moved = torch.add(self.master[name], self.z(name, point.draw), alpha=point.scale)
        return moved.to(self.parameters[name].dtype)

    @torch.no_grad()
    def write_at(self, points: Sequence[Point], out: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Write the working weights of every parameter at every point.

        Args:
            points: n points.
            out: parameter name -> n tensors like the parameter.
        """
        if len(points) == 2 and self.fusible and points == (points[0], points[0].opposite):
            self._write_pair(points[0], out)
            return
        for name, tensors in out.items():
            for point, tensor in zip(points, tensors, strict=True):
                tensor.copy_(self.weights_at(name, point))

    @property
    def fusible(self) -> bool:
        """Whether the fused CUDA kernels do what this scope does."""
        return all(p.is_cuda and p.is_contiguous() for p in self.parameters.values())

    def _keys(self, draw: Draw) -> torch.Tensor:
        """Philox keys of the parameters, int64 [P] on the device, in their order."""
        if self._keys_of != draw:
            keys = [key(draw.seed, draw.step, name, draw.direction) for name in self.parameters]
            signed = torch.tensor(keys, dtype=torch.uint64).view(torch.int64)
            device = next(iter(self.parameters.values())).device
            self._keys_there = signed.pin_memory().to(device, non_blocking=True)
            self._keys_of = draw
        return self._keys_there

    def _write_pair(self, point: Point, out: Mapping[str, Sequence[torch.Tensor]]) -> None:
        from zo_core.zo.kernels.noise import perturb_pair

        keys, noise = self._keys(point.draw), point.draw.noise
        for which, (name, master) in enumerate(self.master.items()):
            plus, minus = out[name]
            perturb_pair(noise, master, plus, minus, keys, which, point.scale)

    def step_along(self, draw: Draw, alpha: torch.Tensor) -> None:
        """``master += alpha z``, and the working weights from it, without waiting for the device.

        Args:
            draw: of z.
            alpha: float32 scalar on the device.
        """
        from zo_core.zo.kernels.noise import step

        keys = self._keys(draw)
        for which, (name, master) in enumerate(self.master.items()):
            step(draw.noise, master, self.parameters[name], keys, which, alpha)

    @torch.no_grad()
    def perturb(self, point: Point) -> None:
        """Set the working weights to those of a point."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights_at(name, point))

    @torch.no_grad()
    def restore(self) -> None:
        """Set the working weights to the master, exactly."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.master[name])

    @torch.no_grad()
    def update(self, draw: Draw, g: float, lr: float, weight_decay: float = 0.0) -> None:
        """Step the master against ``g z`` and restore the working weights from it."""
        for name, master in self.master.items():
            if weight_decay and not NO_DECAY.search(name):
                master.mul_(1.0 - lr * weight_decay)
            master.add_(self.z(name, draw), alpha=-lr * g)
        self.restore()

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set master and working weights from saved fp32 tensors.

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
        for name, parameter in self.parameters.items():
            parameter.copy_(self._base[name])
