"""Several points of weight space in one forward pass.

Below the lowest tuned module all points see the same numbers; above the highest, the same weights.
So the points' tokens run through the model side by side, as copies of one packed row, and only the
modules that own tuned weights treat the copies apart: each copy meets its own weights. Everything
else works on one larger matrix, whose weights are read once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class NotTokenwiseError(Exception):
    """A tuned module does not treat tokens alike, so its input cannot be split into copies."""


@contextmanager
def paired(
    model: nn.Module, weights: Mapping[str, Sequence[torch.Tensor]], tokens: int
) -> Iterator[None]:
    """Within, copy i of the packed row meets ``weights[name][i]``.

    Args:
        model: the model.
        weights: name of every tuned parameter -> its values at each of the n points.
        tokens: T, so that the row that runs has n x T tokens.
    """
    owners: dict[str, dict[str, Sequence[torch.Tensor]]] = {}
    for name, values in weights.items():
        owner, _, own = name.rpartition(".")
        owners.setdefault(owner, {})[own] = values
    modules = [model.get_submodule(owner) for owner in owners]
    for module, changed in zip(modules, owners.values(), strict=True):
        module.forward = _apart(module, changed, tokens)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # uncovers the class's own


def _apart(
    module: nn.Module, weights: Mapping[str, Sequence[torch.Tensor]], tokens: int
) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    """A forward that gives every copy its own weights."""
    forward = module.forward
    copies = len(next(iter(weights.values())))

    def run(*args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        parts = [_split(arg, copies, tokens) for arg in args]
        named = {name: _split(arg, copies, tokens) for name, arg in kwargs.items()}
        axis = _token_axis(args[0] if args else next(iter(kwargs.values())), copies * tokens)
        true = {name: module._parameters[name] for name in weights}
        outputs = []
        try:
            for copy in range(copies):
                for name, values in weights.items():
                    module._parameters[name] = values[copy]  # type: ignore[assignment]
                outputs.append(
                    forward(*(p[copy] for p in parts), **{n: p[copy] for n, p in named.items()})
                )
        finally:
            module._parameters.update(true)
        if isinstance(outputs[0], tuple):  # a router of experts
            return tuple(torch.cat(part, dim=axis) for part in zip(*outputs, strict=True))
        return torch.cat(outputs, dim=axis)

    return run


def _token_axis(value: Any, length: int) -> int:
    """The axis along which the copies of the row lie.

    Raises:
        NotTokenwiseError: there is none.
    """
    if isinstance(value, torch.Tensor) and length in value.shape:
        # Tokens come before channels: [1, n T, H], or flattened [n T, H], where H may be n T.
        return value.shape.index(length)
    raise NotTokenwiseError


def _split(value: Any, copies: int, tokens: int) -> Sequence[Any]:
    """The parts of an argument that belong to each copy; what has no tokens goes to all."""
    try:
        axis = _token_axis(value, copies * tokens)
    except NotTokenwiseError:
        return [value] * copies
    return value.chunk(copies, dim=axis)
