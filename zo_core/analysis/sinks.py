"""Attention sinks: how much attention the massive tokens draw, by layer and head.

For a head, over all queries that can see a massive token (it is at their place or before it) and
are none themselves: the mean of the attention weights on massive tokens, summed. ``uniform`` is the
same if every query spread its attention evenly over what it can see. Sun et al. 2024 and Xiao et
al. 2023 (attention sinks) find most of the mass there, in the layers where activations are massive.

The weights are those of the model's own eager attention, which returns them; they are reduced layer
by layer and not kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import nn

from zo_core.analysis.recording import RecordedBatch, Recording
from zo_core.models.parts import find_parts


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Within, the model's attention computes and returns its weights."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def without_sinks(recording: Recording, massive: Sequence[torch.Tensor]) -> str:
    """Why a table of sinks is empty."""
    looks = (queries_of(b, m).any() for b, m in zip(recording.batches, massive, strict=True))
    if not any(map(bool, looks)):
        return "no token comes after a massive one without being massive itself"
    return "the attention of this family returns no weights"


@torch.no_grad()
def sink_shares(
    recording: Recording,
    massive: Sequence[torch.Tensor],
    tick: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """The share of attention on massive tokens.

    Args:
        recording: the texts.
        massive: bool [B, T] for every batch: its massive tokens.
        tick: called after every batch; may raise to stop.

    Returns:
        ``layer, head, share, uniform``; a layer whose attention returns no weights is absent.
    """
    totals: dict[int, torch.Tensor] = {}  # layer -> float64 [heads]
    uniform, queries = 0.0, 0
    loaded = recording.loaded
    for batch, marked in zip(recording.batches, massive, strict=True):
        looks = queries_of(batch, marked)
        seen = marked.cumsum(-1) / torch.arange(1, marked.shape[1] + 1, device=marked.device)
        uniform += float(seen[looks].sum(dtype=torch.float64))
        queries += int(looks.sum())
        handles = []
        for layer, block in enumerate(loaded.decoder.blocks):
            mixer = find_parts(block).mixer
            if mixer is not None:
                hook = _adder(layer, totals, marked, looks)
                handles.append(mixer.register_forward_hook(hook))
        try:
            with eager(loaded.model):
                loaded.model.base_model(input_ids=batch.ids, use_cache=False)  # type: ignore[operator]
        finally:
            for handle in handles:
                handle.remove()
        tick()
    rows = [
        (layer, head, share / queries, uniform / queries)
        for layer, total in sorted(totals.items())
        for head, share in enumerate(total.tolist())
        if queries
    ]
    return pd.DataFrame(rows, columns=["layer", "head", "share", "uniform"])


def queries_of(batch: RecordedBatch, marked: torch.Tensor) -> torch.Tensor:
    """Which tokens are real, can see a massive one and are none: bool [B, T]."""
    return batch.real & ~marked & (marked.cumsum(-1) > 0)


def _adder(
    layer: int, totals: dict[int, torch.Tensor], marked: torch.Tensor, looks: torch.Tensor
) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: object) -> None:
        weights = _weights(output, marked.shape)
        if weights is None:
            return
        share = (weights * marked[:, None, None, :]).sum(-1, dtype=torch.float32)  # [B, heads, T]
        found = (share * looks[:, None]).sum((0, 2), dtype=torch.float64)
        totals[layer] = totals.get(layer, torch.zeros_like(found)) + found

    return hook


def _weights(output: object, shape: torch.Size) -> torch.Tensor | None:
    """The attention weights [B, heads, T, T] among what an attention module returns."""
    rows, tokens = shape
    for value in output if isinstance(output, tuple | list) else ():
        if (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.shape[-2:] == (tokens, tokens)
        ):
            return value.reshape(rows, -1, tokens, tokens)
    return None
