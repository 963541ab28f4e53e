"""How far two forward paths, or their gradients, may be apart: what rounding explains, measured.

Both paths do the same sums in another order. In bfloat16 or float16 each is off from the exact
result by roundings that pile up through the layers, by how much depends on the model; so it is
measured: the reference path runs once more with every product in float32, and the root mean square
of ``log p(half) - log p(float32)``, over the vocabulary at all scored places, is its rounding noise
sigma. The fast path is another rounding of the same numbers with a noise of its own of about the
same size, so by the triangle inequality the two are at most about ``2 sigma`` apart (``sqrt(2)
sigma`` if their errors are independent). :data:`FACTOR` is half as much again, as kernels that fuse
or pack round at other places and other numbers of times. A path that computes something else (a
token lost, a position wrong) is off by what the token or the position means to the model.

Projected gradients are held against float32 in the same way, for an fp8 suffix: :func:`fp8_error`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zo_core.errors import UserError
from zo_core.models.load import LoadedModel
from zo_core.tasks.templates import Example
from zo_core.zo.estimator import estimate
from zo_core.zo.forward import FastForward
from zo_core.zo.reference import Forward, Prepared, ReferenceForward
from zo_core.zo.scope import Draw, TunedScope

FACTOR = 3.0
"""Largest distance of the paths, in units of the reference path's own rounding noise."""

FLOAT32_SHARE = 1e-4
"""The same for float32, as a share of the log-probabilities: some thousand roundings of 2**-24."""


@torch.no_grad()
def distance(
    loaded: LoadedModel, path: Forward, examples: Sequence[Example]
) -> tuple[float, float]:
    """How far a path is from the reference path, and how far rounding alone may take it.

    Args:
        loaded: the model, with its base weights.
        path: the path in question.
        examples: a few.

    Returns:
        Root mean squares over [P scored tokens, V log-probabilities], in nats: the distance, of a
        single pass or as a point of a pair, whichever is larger; and its bound.

    Raises:
        NotImplementedError: the path cannot run this family.
    """
    reference = ReferenceForward(loaded)
    plain = _log_probabilities(reference, examples)
    prepared = path.prepare(examples)
    ours = [
        path.logits(prepared),
        *(path.beside(prepared) if isinstance(path, FastForward) else []),
    ]
    apart = max(_rms(_of_scored(prepared, logits) - plain) for logits in ours)
    if loaded.dtype == torch.float32:
        return apart, FLOAT32_SHARE * _rms(plain)
    with in_float32(loaded.model):
        exact = _log_probabilities(reference, examples)
    return apart, FACTOR * _rms(plain - exact)


def _log_probabilities(path: Forward, examples: Sequence[Example]) -> torch.Tensor:
    """Float32 [P, V]: what the model says of every token at the places of the scored ones."""
    prepared = path.prepare(examples)
    return _of_scored(prepared, path.logits(prepared))


def _of_scored(prepared: Prepared, logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)[prepared.scored.place]


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@torch.no_grad()
def fp8_error(
    loaded: LoadedModel,
    forward: FastForward,
    scope: TunedScope,
    examples: Sequence[Example],
    draws: Sequence[Draw],
    eps: float,
) -> tuple[float, float]:
    """What rounding does to the projected gradient, without and with the path's fp8 suffix.

    Args:
        loaded: the model.
        forward: a path with an fp8 suffix.
        scope: the tuned weights; left as they are.
        examples: a batch.
        draws: the directions to try.
        eps: perturbation scale.

    Returns:
        Root mean square over the draws of g - g(float32), in units of that of g(float32): of the
        path in the model's own arithmetic, and with the suffix in fp8. All three round the tuned
        weights at each point to the model's dtype.

    Raises:
        UserError: g is 0 for every draw.
    """

    def gradients(path: Forward, batch: Prepared) -> torch.Tensor:
        return torch.tensor([estimate(path, [batch], scope, [d], eps).g[0] for d in draws])

    reference, prepared = ReferenceForward(loaded), forward.prepare(examples)
    eight, forward.fp8 = forward.fp8, None
    graphs = forward.use_graphs(False)
    try:
        own = gradients(forward, prepared)
        forward.fp8 = eight
        fp8 = gradients(forward, prepared)
        with in_float32(loaded.model):
            exact = gradients(reference, reference.prepare(examples))
    finally:
        forward.fp8 = eight
        forward.use_graphs(graphs)
        scope.restore()
    size = _rms(exact)
    if size == 0:
        raise UserError(
            f"suffix: fp8 cannot be judged, as no loss moves at eps {eps:g}: raise eps, or leave "
            "suffix at model."
        )
    return _rms(own - exact) / size, _rms(fp8 - exact) / size


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within, the model computes in float32 with its own weights.

    Weights are widened module by module, while the module runs: that takes the memory of one
    module more, not of a second model.
    """
    owners = [m for m in model.modules() if any(p is not None for p in m._parameters.values())]
    for module in owners:
        module.forward = _widened(module)
    try:
        yield
    finally:
        for module in owners:
            del module.forward  # uncovers the class's own


def _widened(module: nn.Module) -> Callable[..., Any]:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        true = dict(module._parameters)
        for name, parameter in true.items():
            module._parameters[name] = _wide(parameter)
        try:
            return forward(*map(_wide, args), **{n: _wide(a) for n, a in kwargs.items()})
        finally:
            module._parameters.update(true)

    return run


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().float()
    return value
