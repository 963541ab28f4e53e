"""A scope's weights at several points of weight space, written side by side.

On a GPU one kernel reads the master once and makes z on the way; elsewhere, and for scopes that it
cannot do, :meth:`TunedScope.weights_at` says what to write.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from zo_core.upload import upload
from zo_core.zo.grouped import Group, Groups
from zo_core.zo.noise import key
from zo_core.zo.scope import Draw, Point, TunedScope

_keys: WeakKeyDictionary[TunedScope, tuple[Draw, torch.Tensor]] = WeakKeyDictionary()
"""The keys that a scope was perturbed with last: its update asks for them again."""


def keys_on_device(scope: TunedScope, draw: Draw) -> torch.Tensor:
    """Philox keys of a scope's parameters, int64 [P], in their order."""
    if scope not in _keys or _keys[scope][0] != draw:
        keys = [key(draw.seed, draw.step, name, draw.direction) for name in scope.parameters]
        signed = torch.tensor(keys, dtype=torch.uint64).view(torch.int64)
        device = next(iter(scope.parameters.values())).device
        _keys[scope] = draw, upload([signed], device)[0]
    return _keys[scope][1]


def fusible(scope: TunedScope, noise: str) -> bool:
    """Whether the fused kernels do what this scope does."""
    return (
        type(scope) is TunedScope
        and noise in {"gaussian", "rademacher"}
        and all(p.is_cuda and p.is_contiguous() for p in scope.parameters.values())
        and all(m.is_cuda and m.is_contiguous() for m in scope.masks.values())
    )


_groups: WeakKeyDictionary[TunedScope, Groups] = WeakKeyDictionary()


def _groups_of(scope: TunedScope, out: Mapping[str, Sequence[torch.Tensor]]) -> list[Group]:
    """What one launch of a kernel each goes through, tables made at the first step."""
    if scope not in _groups:
        _groups[scope] = Groups(scope)
    return _groups[scope].writing_to(out)


def _itself(scope: TunedScope) -> dict[str, list[torch.Tensor]]:
    """The working weights as the one output of a kernel."""
    return {name: [p] for name, p in scope.parameters.items()}


def step_along(scope: TunedScope, draw: Draw, alpha: torch.Tensor) -> None:
    """``master += alpha z``, and the working weights from it, without waiting for the device.

    Args:
        scope: a fusible one.
        draw: of z.
        alpha: float32 scalar on the device.
    """
    from zo_core.zo.kernels.noise import step

    keys = keys_on_device(scope, draw)
    for group in _groups_of(scope, _itself(scope)):
        step(draw.noise, group, keys, alpha)


def move_to(scope: TunedScope, point: Point) -> None:
    """Set the working weights of a scope to those of a point."""
    if point.draw is not None and fusible(scope, point.draw.noise):
        write_points(scope, [point], _itself(scope))
    else:
        scope.perturb(point)


@dataclass(slots=True)
class Owed:
    """An update for the master to be given: ``master += alpha z``."""

    draw: Draw
    alpha: torch.Tensor
    """float32 scalar on the device."""
    paid: bool = False
    """Whether the master has it: a forward pass may break off after that."""


def write_points(
    scope: TunedScope,
    points: Sequence[Point],
    out: Mapping[str, Sequence[torch.Tensor]],
    owed: Owed | None = None,
) -> None:
    """Write the working weights of every parameter at every point.

    Args:
        scope: the scope.
        points: n points.
        out: parameter name -> n tensors like the parameter.
        owed: an update to make first, in the same pass over the master; only for a pair of points
            of a fusible scope.
    """
    draw, eps = points[0].draw, points[0].scale
    one, pair = (Point(draw, eps),), (Point(draw, eps), Point(draw, -eps))
    if draw is None or tuple(points) not in (one, pair) or not fusible(scope, draw.noise):
        assert owed is None, "an update is owed where nothing fused can make it"
        for name, tensors in out.items():
            for point, tensor in zip(points, tensors, strict=True):
                tensor.copy_(scope.weights_at(name, point))
        return
    from zo_core.zo.kernels.noise import perturb, perturb_pair, step_pair

    before = None if owed is None else keys_on_device(scope, owed.draw)
    keys = keys_on_device(scope, draw)
    for group in _groups_of(scope, out):
        if len(points) == 1:
            perturb(draw.noise, group, keys, eps)
        elif owed is None or before is None:
            perturb_pair(draw.noise, group, keys, eps)
        else:
            step_pair(draw.noise, group, before, keys, owed.alpha, eps)
    if owed is not None:
        owed.paid = True
