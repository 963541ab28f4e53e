"""Several points of weight space in one forward pass.

Below the lowest tuned module all points see the same numbers; above the highest, the same weights.
So the points' tokens run through the model side by side, as copies of one packed row, and only the
modules that own tuned weights treat the copies apart: each copy meets its own weights. Everything
else works on one larger matrix, whose weights are read once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from zo_core.zo.attention import current, over


class NotTokenwiseError(Exception):
    """A tuned module does not treat tokens alike, so its input cannot be split into copies."""


class NotWholeError(Exception):
    """A tuned block passes things on beside its states, such as keys that later blocks share."""


@contextmanager
def paired(
    model: nn.Module,
    weights: Mapping[str, Sequence[torch.Tensor]],
    tokens: int,
    whole: Mapping[str, Callable[..., Any]],
) -> Iterator[None]:
    """Within, copy i of the packed row meets ``weights[name][i]``.

    Args:
        model: the model.
        weights: name of every tuned parameter -> its values at each of the n points.
        tokens: T, so that the row that runs has n x T tokens.
        whole: names of blocks that treat the copies apart as a whole, and what runs for each. Of
            other blocks, only the modules that own tuned weights do.

    Raises:
        NotTokenwiseError: a module that owns tuned weights has not run: they are used otherwise.
    """
    owners: dict[str, dict[str, Sequence[torch.Tensor]]] = {}
    for name, values in weights.items():
        block = next((b for b in whole if name.startswith(f"{b}.")), None)
        owner = name.rpartition(".")[0] if block is None else block
        owners.setdefault(owner, {})[name] = values
    copies = len(next(iter(weights.values())))
    modules = {owner: model.get_submodule(owner) for owner in owners}
    idle = set(owners)
    within: list[int] = []
    """The copy that a module around those that run now is at."""
    for owner, module in modules.items():
        places = []
        for name, values in owners[owner].items():
            at, _, own = name.rpartition(".")
            places.append((model.get_submodule(at)._parameters, own, values))
        run = _apart(
            *(whole.get(owner, module.forward), places, copies, tokens, within),
            inner=next(module.children(), None) is not None,
        )
        module.forward = _noted(run, owner, idle)
    try:
        yield
        if idle:
            raise NotTokenwiseError
    finally:
        for module in modules.values():
            del module.forward  # uncovers the class's own


def _noted(forward: Callable[..., Any], owner: str, idle: set[str]) -> Callable[..., Any]:
    """A forward that takes its module from the idle ones."""

    def run(*args: Any, **kwargs: Any) -> Any:
        idle.discard(owner)
        return forward(*args, **kwargs)

    return run


def _apart(
    forward: Callable[..., Any],
    places: Sequence[tuple[dict[str, Any], str, Sequence[torch.Tensor]]],
    copies: int,
    tokens: int,
    within: list[int],
    inner: bool,
) -> Callable[..., Any]:
    """A forward that gives every copy its own weights.

    Args:
        forward: what runs on each copy.
        places: where the weights belong, the parameters of a module and a name, and their values.
        copies: n.
        tokens: T.
        within: the copy that a module around this one is at, if any: it has been split already.
        inner: whether there are modules, and so perhaps attention, within.
    """

    def one(copy: int, *args: Any, **kwargs: Any) -> Any:
        true = [parameters[name] for parameters, name, _ in places]
        try:
            for parameters, name, values in places:
                parameters[name] = values[copy]
            return forward(*args, **kwargs)
        finally:
            for (parameters, name, _), parameter in zip(places, true, strict=True):
                parameters[name] = parameter

    def run(*args: Any, **kwargs: Any) -> Any:
        if within:
            return one(within[-1], *args, **kwargs)
        if inner and any(isinstance(value, Mapping) for value in (*args, *kwargs.values())):
            raise NotWholeError
        held: Any = current() if inner else None
        parts = [_split(arg, copies, tokens) for arg in args]
        named = {name: _split(arg, copies, tokens) for name, arg in kwargs.items()}
        first = args[0] if args else next(iter(kwargs.values()))
        axis = token_axis(first, copies * tokens)
        outputs = []
        for copy in range(copies):
            within.append(copy)
            try:
                with over(held.first_of(copies)) if inner else nullcontext():
                    given = {name: part[copy] for name, part in named.items()}
                    outputs.append(one(copy, *(part[copy] for part in parts), **given))
            finally:
                within.pop()
        if isinstance(outputs[0], tuple):  # a router of experts, or a block
            return tuple(_joined(part, first.dim(), axis) for part in zip(*outputs, strict=True))
        return _joined(outputs, first.dim(), axis)

    return run


def _joined(parts: Sequence[Any], dimensions: int, axis: int) -> Any:
    """The copies of an output, along the axis that its input of so many dimensions had them on.

    Routers give [T, E] for [1, T, H]; an embedding gives [1, T, H] for [1, T].
    """
    if parts[0] is None:
        return None
    return torch.cat(tuple(parts), dim=axis - max(0, dimensions - parts[0].dim()))


def token_axis(value: Any, length: int) -> int:
    """The axis along which the copies of the row lie.

    Raises:
        NotTokenwiseError: there is none, or it may be either of two.
    """
    if isinstance(value, torch.Tensor):
        # Tokens come before channels: [1, n T, H], or flattened [n T, H], where H may be n T. In
        # [1, heads, n T, D] there may be as many heads.
        channels = value.is_floating_point() and value.dim() > 1
        sizes = value.shape[:-1] if channels else value.shape
        if length in sizes and not (value.dim() > 3 and sizes.count(length) > 1):
            return sizes.index(length)
    raise NotTokenwiseError


def _split(value: Any, copies: int, tokens: int) -> Sequence[Any]:
    """The parts of an argument that belong to each copy; what has no tokens goes to all."""
    if isinstance(value, tuple) and value:  # cosines and sines of the positions
        return list(zip(*(_split(part, copies, tokens) for part in value), strict=True))
    try:
        axis = token_axis(value, copies * tokens)
    except NotTokenwiseError:
        return [value] * copies
    return value.chunk(copies, dim=axis)
