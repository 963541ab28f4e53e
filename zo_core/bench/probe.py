"""A whole sensitivity probe of a published shape: every layer, some draws, 16 rows of 64 tokens.

Timed from the loaded model to the finished tables, everything included: the first pass, the copies
of each layer's weights, z, both forward passes from the layer up, relative changes of all blocks.
"""

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zo_core.analysis.probe import Probe
from zo_core.analysis.sensitivity import ProbeSettings, summarise
from zo_core.bench.shapes import build
from zo_core.bench.step import PEAK_FLOPS
from zo_core.errors import UserError
from zo_core.models.load import LoadedModel
from zo_core.provenance import provenance
from zo_core.tasks.templates import Candidate, Example
from zo_core.zo.layerwise import LayerwiseBatch
from zo_core.zo.path import choose_forward

ROWS, TOKENS = 16, 64
SWEEP = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
TARGET = 60.0
"""Seconds that a probe of 32 layers x 8 draws of the LLaMA2-7B shape may take on an H200."""


def run_probe_bench(
    shape: str,
    draws: int = 8,
    everything: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Time a probe of all layers.

    Args:
        shape: a key of :data:`zo_core.bench.shapes.SHAPES`.
        draws: of z, a layer.
        everything: two batches, an eps sweep and the three scalings as well.
        device: see :class:`~zo_core.jobs.ModelFields`.
        dtype: likewise.
        say: receives a line now and then.

    Returns:
        ``shape, layers, draws, rows, tokens, everything, pairs, seconds`` and its ``parts``,
        ``ms_per_pair, flops`` (matrix products of the blocks that run), ``utilisation`` (null where
        the device's peak is not known), ``peak_bytes``, ``restored``, ``mean_abs_g, provenance``.

    Raises:
        UserError: the shape is unknown, or its fast path cannot be taken.
    """
    if draws < 1:
        raise UserError(f"draws: {draws} leaves nothing to measure: give at least 1.")
    loaded, _ = build(shape, device, dtype)
    before = _digests(loaded)
    layers = range(len(loaded.decoder))
    examples = [_examples(loaded, number) for number in range(2 if everything else 1)]
    forward, reason = choose_forward(loaded, "auto", 0, examples[0][:2])
    if forward.name != "fast":
        raise UserError(f"shape: {shape} cannot be probed on the fast path: {reason}.")
    _warm_up(loaded, examples[0][:2])
    if loaded.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    clock = _Clock(loaded.device)
    batches = [LayerwiseBatch(loaded, rows) for rows in examples]
    clock.mark("first pass")
    settings = ProbeSettings(draws, 1e-3, "gaussian", 0, SWEEP if everything else ())
    scalings = ("count", "rms", "output") if everything else ()
    probe = Probe(loaded, batches, layers, settings, scalings)
    clock.mark("weights' rms")
    done = 0

    def after_layer() -> None:
        nonlocal done
        done += 1
        say(f"{done} layers, {clock.total():.1f} s")

    tables = probe.run(after_layer=after_layer)
    clock.mark("probe")
    frames = tables.frames()
    clock.mark("tables")

    seconds = clock.total()
    flops = _flops(loaded, probe)
    facts = provenance(loaded)
    peak = PEAK_FLOPS.get(facts["device_name"])
    summary = summarise(frames["draws"])
    strength = summary[summary["metric"] == "abs_projected_gradient"]["mean"]
    return {
        "shape": shape,
        "layers": len(layers),
        "draws": draws,
        "rows": ROWS,
        "tokens": TOKENS,
        "everything": everything,
        "pairs": probe.pairs,
        "seconds": seconds,
        "parts": clock.parts,
        "ms_per_pair": 1e3 * clock.parts["probe"] / probe.pairs,
        "flops": flops,
        "utilisation": flops / clock.parts["probe"] / peak if peak else None,
        "peak_bytes": (torch.cuda.max_memory_allocated() if loaded.device.type == "cuda" else None),
        "restored": _digests(loaded) == before,
        "mean_abs_g": strength.tolist(),
        "provenance": facts,
    }


def _examples(loaded: LoadedModel, seed: int) -> list[Example]:
    """Random rows, classified by one token each, as SST-2's are."""
    generator = random.Random(seed)  # noqa: S311 - a reproducible draw
    most = min(8000, loaded.tokenizer.vocab_size)
    answers = (2, 3)
    found = []
    for _ in range(ROWS):
        prompt = tuple(generator.randrange(4, most) for _ in range(TOKENS))
        candidates = tuple(Candidate((*prompt, answer), TOKENS) for answer in answers)
        found.append(Example(candidates, label=generator.randrange(2), truncated=False))
    return found


def _warm_up(loaded: LoadedModel, examples: list[Example]) -> None:
    """Kernels are compiled and libraries loaded once a machine, not once a probe."""
    last = len(loaded.decoder) - 1
    settings = ProbeSettings(1, 1e-3, "gaussian", 0)
    Probe(loaded, [LayerwiseBatch(loaded, examples)], [last], settings).run()


def _digests(loaded: LoadedModel) -> list[tuple[int, int]]:
    """Two sums of the bits of every parameter, one of them weighted by place."""
    found = []
    for parameter in loaded.model.parameters():
        kind = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
        plain = weighted = 0
        for bits in parameter.detach().view(kind).flatten().split(1 << 24):
            place = torch.arange(len(bits), device=bits.device) % 8191 + 1
            plain += int(bits.sum(dtype=torch.int64))
            weighted += int((bits * place).sum())
        found.append((plain, weighted))
    return found


def _flops(loaded: LoadedModel, probe: Probe) -> float:
    """Operations of the blocks' matrix products, from the perturbed layer up, both points."""
    sizes = [
        sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
        for block in loaded.decoder.blocks
    ]
    above = [sum(sizes[layer:]) for layer in probe.layers]
    return 2.0 * 2 * ROWS * TOKENS * sum(above) * probe.pairs / len(probe.layers)


class _Clock:
    """Seconds by part, each from one synchronisation with the device to the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.parts: dict[str, float] = {}
        self._began = self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def mark(self, part: str) -> None:
        now = self._now()
        self.parts[part] = now - self._last
        self._last = now

    def total(self) -> float:
        return self._now() - self._began
