"""Where a step of ours spends its time."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zo_core.models.load import LoadedModel
from zo_core.tasks.templates import Example
from zo_core.zo.forward import FastForward
from zo_core.zo.points import fusible, step_along, write_points
from zo_core.zo.scope import Draw, Point, TunedScope

REPEATS = 5


def our_phases(
    loaded: LoadedModel,
    fast: FastForward,
    scope: TunedScope,
    batch: Sequence[Example],
    layer: int,
    eps: float,
) -> dict[str, float]:
    """Milliseconds by phase of a step on a batch.

    ``host`` lays the batch out and finds its ``prefix`` in the cache, ``perturb`` writes the
    weights of both points, ``forward`` runs from the tuned layer's input to the logits. Its parts,
    ``tuned layer``, ``suffix`` and ``head``, are timed without CUDA graphs: where launching takes
    longer than computing, they add up to more than ``forward``.
    """
    prepared = fast.prepare(batch)
    steps = itertools.count(1)  # a fresh z every time, as in a run

    def points() -> tuple[Point, Point]:
        draw = Draw("gaussian", 0, next(steps))
        return Point(draw, eps), Point(draw, -eps)

    def timed(run: Callable[[], object]) -> float:
        run()
        began = _now(loaded)
        for _ in range(REPEATS):
            run()
        return (_now(loaded) - began) / REPEATS

    weights = {n: [torch.empty_like(p) for _ in range(2)] for n, p in scope.parameters.items()}
    perturb = timed(lambda: write_points(scope, points(), weights))
    both = timed(lambda: fast.logits_at(prepared, scope, points()))
    found = {
        "host and prefix": timed(lambda: fast.prepare(batch)),
        "perturb": perturb,
        "forward": max(both - perturb, 0.0),  # noise of a busy machine may exceed it
        "update": timed(_update(scope)),
    }
    fast.use_graphs(False)
    try:
        return found | _parts(loaded, lambda: fast.logits_at(prepared, scope, points()), layer)
    finally:
        fast.use_graphs(True)


def _update(scope: TunedScope) -> Callable[[], object]:
    draw = Draw("gaussian", 0, 1)
    if fusible(scope, draw.noise):
        zero = torch.zeros((), device=next(iter(scope.parameters.values())).device)
        return lambda: step_along(scope, draw, zero)
    return lambda: scope.update(lambda name: [(0.0, scope.z(name, draw))], 0.0)


def _parts(loaded: LoadedModel, run: Callable[[], object], layer: int) -> dict[str, float]:
    """Milliseconds of the tuned layer, of those above it, and of the head."""
    times: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(*_args: Any) -> None:
            times[name] = _now(loaded)

        return hook

    run()
    block = loaded.decoder.blocks[layer]
    head = loaded.model.get_output_embeddings()  # type: ignore[operator]
    handles = [
        block.register_forward_pre_hook(note("tuned layer")),
        block.register_forward_hook(note("suffix")),
        head.register_forward_pre_hook(note("head")),
        head.register_forward_hook(note("end")),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    names = ("tuned layer", "suffix", "head", "end")
    return {a: times[b] - times[a] for a, b in zip(names, names[1:], strict=False)}


def _now(loaded: LoadedModel) -> float:
    """Milliseconds, once the device has done what it was given."""
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    return time.perf_counter() * 1e3
