"""Attention over a packed row, put in place through the attention registry of ``transformers``.

Models run packed through their own modules; only this function is ours. It can also stop a block
where its keys are known, and run other queries against keys that were kept: what
:mod:`zo_core.zo.last_block` is made of.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from zo_core.zo.packing import Packing

NAME = "zoscope_packed"


class Borders(Protocol):
    """Where the segments of a packed row lie, as the kernel on a GPU reads it."""

    @property
    def shared(self) -> bool: ...  # noqa: D102
    @property
    def longest_query(self) -> int: ...  # noqa: D102
    @property
    def query_borders(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def key_starts(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def key_ends(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def key_index(self) -> torch.Tensor: ...  # noqa: D102


class Copies(Borders, Protocol):
    """The same of a row that holds some copies of a batch."""

    def first_of(self, copies: int) -> Borders: ...  # noqa: D102


_packing: Borders | None = None
"""The packing of the forward pass in progress; a worker runs one at a time."""

_dtype: torch.dtype | None = None
"""What its attention computes in; None: the dtype of the states."""

_until_keys = False
"""Whether attention is where the pass ends."""

_kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None
"""Keys and values that stand in for the pass's own, until they are taken."""


class KeysReached(Exception):  # noqa: N818 - a signal, not an error
    """Carries keys and values, [1, key heads, T, D], out of a block that need not go on."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:  # noqa: D107
        super().__init__()
        self.key, self.value = key, value


class AttentionAgainError(Exception):
    """A block asks for attention a second time, and the keys that stand in are of the first."""


def current() -> Borders:
    """The packing of the forward pass in progress."""
    assert _packing is not None, "packed attention outside of packed()"
    return _packing


@contextmanager
def packed(model: nn.Module, packing: Borders, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within, the model's attention keeps the segments of a packed row apart.

    Args:
        model: the model.
        packing: of the row.
        dtype: what attention computes in; None: the dtype of the states.
    """
    global _packing, _dtype
    config: Any = model.config
    before = (_packing, config._attn_implementation, _dtype)
    _packing, _dtype = packing, dtype
    config._attn_implementation = NAME
    try:
        yield
    finally:
        _packing, config._attn_implementation, _dtype = before


@contextmanager
def over(packing: Borders) -> Iterator[None]:
    """Within, attention has another packing."""
    global _packing
    before, _packing = _packing, packing
    try:
        yield
    finally:
        _packing = before


@contextmanager
def until_keys() -> Iterator[None]:
    """Within, a pass ends where attention begins, by :class:`KeysReached`."""
    global _until_keys
    _until_keys = True
    try:
        yield
    finally:
        _until_keys = False


@contextmanager
def against(key: torch.Tensor, value: torch.Tensor) -> Iterator[None]:
    """Within, queries meet these, whatever keys and values come with them; once.

    Raises:
        AttentionAgainError: there are queries a second time.
    """
    global _kept
    _kept = [(key, value)]
    try:
        yield
    finally:
        _kept = None


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a packed row, with the signature that ``transformers`` calls.

    Args:
        module: the attention module; not used.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, D].
        attention_mask: None; the packing says what is seen.
        scaling: factor of the scores; None: 1 / sqrt(D).
        sliding_window: see :meth:`Packing.visible`.
        softcap: scores become ``softcap tanh(scores / softcap)`` (Gemma 2).
        options: what else a family passes.

    Returns:
        [1, T, heads, D], and None for the weights.

    Raises:
        NotImplementedError: the family wants something of attention that this does not do.
    """
    if options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise NotImplementedError("attention with sinks or biases is not packed")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if _dtype is not None:
        query, key, value = query.to(_dtype), key.to(_dtype), value.to(_dtype)
    run = _opaque if torch.compiler.is_compiling() else _attend
    return run(query, key, value, scaling, sliding_window or 0, softcap or 0.0), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Attention of the packing in progress, [1, T, heads, D]; window and softcap 0 mean none."""
    if _until_keys:
        raise KeysReached(key, value)
    if _kept is not None:
        if not _kept:
            raise AttentionAgainError
        key, value = _kept.pop()
    packing = current()
    if query.is_cuda:
        from zo_core.zo.kernels.attention import attend

        return attend(query[0], key[0], value[0], packing, scaling, window, softcap)[None]
    assert isinstance(packing, Packing), "static packings are for a GPU"
    q = _gather(query[0], packing.padded_queries)
    k, v = (_gather(x[0], packing.padded_keys) for x in (key, value))
    seen = packing.visible(window)
    if not softcap:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=True
        )
    else:
        out = _softcapped(q, k, v, seen, scaling, softcap)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, packing.unpad)[None]


@torch.library.custom_op("zoscope::packed_attention", mutates_args=())
def _opaque(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """The same as one operation that a compiler does not look into: the packing changes."""
    return _attend(query, key, value, scaling, window, softcap)


@_opaque.register_fake
def _(query: torch.Tensor, *_args: Any) -> torch.Tensor:
    return query.new_empty(query.shape).transpose(1, 2).contiguous()


def _gather(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """States [heads, T, D] of the tokens of an index [S, L] -> [S, heads, L, D]."""
    flat = states.index_select(1, index.flatten())
    return flat.unflatten(1, index.shape).transpose(0, 1)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Plain attention with capped scores: query [S, heads, Lq, D] -> the same shape."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(NAME, attention)
