"""Packing: the token rows of a batch as one row without padding, and attention over it.

A packed batch is a list of *segments* laid end to end in one row of T tokens. A segment is a whole
sequence, or what one candidate adds to the prompt of another: then its queries also see the
prompt's keys, which are computed once. Models run packed through their own modules; only the
attention function is ours, put in place through the attention registry of ``transformers``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

NAME = "zoscope_packed"


@dataclass(frozen=True)
class Packing:
    """Where the segments of a packed row lie. S segments, T tokens, K gathered keys."""

    device: torch.device
    query_lengths: tuple[int, ...]
    """Tokens of each segment; they sum to T."""
    keys: tuple[range | tuple[int, ...], ...]
    """For each segment, the tokens its queries can see, in order; the segment's own come last."""

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.query_lengths)

    @property
    def longest_query(self) -> int:
        """Tokens of the longest segment."""
        return max(self.query_lengths)

    @property
    def longest_key(self) -> int:
        """Keys of the segment that has most."""
        return max(self.key_lengths)

    @cached_property
    def shared(self) -> bool:
        """Whether any segment sees the keys of another."""
        return any(len(k) != n for k, n in zip(self.keys, self.query_lengths, strict=True))

    @cached_property
    def key_lengths(self) -> tuple[int, ...]:
        """Keys of each segment; they sum to K."""
        return tuple(map(len, self.keys))

    @cached_property
    def key_index(self) -> torch.Tensor:
        """int64 [K]: the keys of all segments, one after the other."""
        return torch.tensor([k for keys in self.keys for k in keys], device=self.device)

    @cached_property
    def query_borders(self) -> torch.Tensor:
        """int32 [S + 1]: where each segment's queries begin."""
        return _borders(self.query_lengths, self.device)

    @cached_property
    def key_borders(self) -> torch.Tensor:
        """int32 [S + 1]: where each segment's keys begin in ``key_index``."""
        return _borders(self.key_lengths, self.device)

    @cached_property
    def padded_queries(self) -> torch.Tensor:
        """int64 [S, Lq]: tokens of each segment, padded with token 0 on the right."""
        starts = (0, *accumulate(self.query_lengths))
        spans = [
            range(start, start + n)
            for start, n in zip(starts[:-1], self.query_lengths, strict=True)
        ]
        return _padded(spans, self.device)

    @cached_property
    def padded_keys(self) -> torch.Tensor:
        """int64 [S, Lk]: keys of each segment, padded with token 0 on the right."""
        return _padded(self.keys, self.device)

    @cached_property
    def unpad(self) -> torch.Tensor:
        """int64 [T]: place of each token in the flattened ``padded_queries``."""
        width = max(self.query_lengths)
        places = [s * width + i for s, n in enumerate(self.query_lengths) for i in range(n)]
        return torch.tensor(places, device=self.device)

    def visible(self, window: int) -> torch.Tensor | None:
        """Which keys, bool [S, 1, Lq, Lk], a padded query sees; None if plain causal says it all.

        Args:
            window: a query sees itself and so many tokens less one before it; 0: all before it.
        """
        if not self.shared and (not window or window >= self.longest_key):
            return None
        queries, keys = torch.tensor([self.query_lengths, self.key_lengths], device=self.device)
        place = (keys - queries)[:, None] + torch.arange(self.longest_query, device=self.device)
        key = torch.arange(self.longest_key, device=self.device)
        seen = (key <= place[:, :, None]) & (key < keys[:, None, None])
        if window:
            seen &= key > place[:, :, None] - window
        return seen[:, None]

    def repeated(self, times: int) -> "Packing":
        """The same segments several times over, one copy behind the other."""
        offsets = [copy * self.tokens for copy in range(times)]
        keys = tuple(tuple(k + offset for k in keys) for offset in offsets for keys in self.keys)
        return Packing(self.device, self.query_lengths * times, keys)

    def first_of(self, copies: int) -> "Packing":
        """The first copy of so many."""
        count = len(self.query_lengths) // copies
        return Packing(self.device, self.query_lengths[:count], self.keys[:count])


def pack(
    rows: Sequence[Sequence[tuple[int, ...]]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Packing, torch.Tensor]:
    """Lay token rows end to end; within a group, a row adds only what follows the common start.

    Args:
        rows: groups (examples) of token rows.
        device: where tensors go.

    Returns:
        Token ids int64 [1, T]; positions int64 [1, T]; the packing; and int64 [R, L], the packed
        place of every token of every row, in order of appearance, padded with 0.
    """
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    keys: list[range | tuple[int, ...]] = []
    places: list[tuple[int, ...]] = []
    for group in rows:
        first_of_group = len(places)
        for number, row in enumerate(group):
            known = places[first_of_group] if number else ()
            common = common_start(group[0], row) if number else 0
            start = len(ids)
            own = range(start, start + len(row) - common)
            places.append((*known[:common], *own))
            if not own:
                continue
            ids += row[common:]
            positions += range(common, len(row))
            lengths.append(len(own))
            keys.append(places[-1] if common else own)
    packing = Packing(device, tuple(lengths), tuple(keys))
    both = upload(torch.tensor([ids, positions]), device)
    return both[:1], both[1:], packing, _padded(places, torch.device("cpu"))


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device; from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Borders(Protocol):
    """Where the segments of a packed row lie, as the kernel on a GPU reads it."""

    @property
    def shared(self) -> bool: ...  # noqa: D102
    @property
    def longest_query(self) -> int: ...  # noqa: D102
    @property
    def query_borders(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def key_borders(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def key_index(self) -> torch.Tensor: ...  # noqa: D102
    def first_of(self, copies: int) -> "Borders": ...  # noqa: D102


def _current() -> Borders:
    assert _packing is not None, "packed attention outside of packed()"
    return _packing


_packing: Borders | None = None
"""The packing of the forward pass in progress; a worker runs one at a time."""

_dtype: torch.dtype | None = None
"""What its attention computes in; None: the dtype of the states."""


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
def one_copy(copies: int) -> Iterator[None]:
    """Within, attention runs over one of the copies that the packing in progress holds."""
    global _packing
    all_of_them = _current()
    _packing = all_of_them.first_of(copies)
    try:
        yield
    finally:
        _packing = all_of_them


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
    packing = _current()
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


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common start of two token rows."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _borders(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return upload(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return upload(torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]), device)
