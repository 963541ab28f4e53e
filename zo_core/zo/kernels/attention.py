"""Attention over the segments of a packed row, one program a handful of queries.

Segments are short and many: a kernel made for long sequences spends its time on rows that are not
there. So blocks are as tall as segments are long, query heads that share a key head are rows of one
block, and the keys that candidates share are read where they lie, through their index. Softmax is
kept running as in FlashAttention (arXiv 2205.14135): scores are never stored.
"""

# mypy: disable-error-code="no-untyped-def"
import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.errors import OutOfResources

from zo_core.zo.attention import Borders

TALL = 24
"""Rows of a segment from which blocks are tall."""

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit(do_not_specialize=["blocks"])
def _segments(
    query,
    key,
    value,
    out,
    query_borders,
    key_starts,
    key_ends,
    key_index,
    blocks,
    scaling,
    window,
    softcap,
    query_head,
    query_token,
    key_head,
    key_token,
    value_head,
    value_token,
    GROUP: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    PADDED_WIDTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    SHARED: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    CAPPED: tl.constexpr,  # noqa: N803
):
    """ROWS // GROUP tokens of a segment, for GROUP query heads; GROUPS such share a key head."""
    tokens: tl.constexpr = ROWS // GROUP
    segment, heads = tl.program_id(0) // blocks, tl.program_id(1)
    first_query, first_key = tl.load(query_borders + segment), tl.load(key_starts + segment)
    queries = tl.load(query_borders + segment + 1) - first_query
    keys = tl.load(key_ends + segment) - first_key
    begin = tl.program_id(0) % blocks * tokens
    if begin >= queries:
        return
    row, channel = tl.arange(0, ROWS), tl.arange(0, PADDED_WIDTH)
    token, head = begin + row // GROUP, heads * GROUP + row % GROUP
    real = ((row < tokens * GROUP) & (token < queries))[:, None] & (channel < WIDTH)[None, :]
    at = (first_query + token).to(tl.int64)
    x = tl.load(
        query + (at * query_token + head * query_head)[:, None] + channel[None, :],
        mask=real,
        other=0.0,
    )
    key += (heads // GROUPS).to(tl.int64) * key_head
    value += (heads // GROUPS).to(tl.int64) * value_head
    place = token + keys - queries
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PADDED_WIDTH), tl.float32)
    first = 0
    if WINDOW:
        first = tl.maximum(begin + keys - queries - window + 1, 0) // KEYS * KEYS
    for start in range(first, tl.minimum(begin + tokens + keys - queries, keys), KEYS):
        which = start + tl.arange(0, KEYS)
        known = which < keys
        where = (first_key + which).to(tl.int64)
        if SHARED:
            where = tl.load(key_index + where, mask=known, other=0)
        there = known[:, None] & (channel < WIDTH)[None, :]
        k = tl.load(key + where[:, None] * key_token + channel[None, :], mask=there, other=0.0)
        scores = tl.dot(x, tl.trans(k), input_precision="ieee") * scaling
        if CAPPED:
            scores = softcap * libdevice.tanh(scores / softcap)
        seen = which[None, :] <= place[:, None]
        if WINDOW:
            seen &= which[None, :] > place[:, None] - window
        scores = tl.where(seen, scores * _LOG2_E, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen no key
        shares = tl.exp2(scores - finite[:, None])
        shrunk = tl.exp2(top - finite)
        total = total * shrunk + tl.sum(shares, 1)
        v = tl.load(value + where[:, None] * value_token + channel[None, :], mask=there, other=0.0)
        sums = tl.dot(shares.to(v.dtype), v, sums * shrunk[:, None], input_precision="ieee")
        top = higher
    sums /= tl.where(total == 0.0, 1.0, total)[:, None]
    count = tl.num_programs(1) * GROUP * WIDTH
    tl.store(
        out + (at * count + head * WIDTH)[:, None] + channel[None, :],
        sums.to(out.dtype.element_ty),
        mask=real,
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Causal attention within each segment.

    Args:
        query: [heads, T, D], D contiguous.
        key: [key heads, K, D], likewise; heads is a multiple of key heads.
        value: likewise.
        borders: where the segments lie.
        scaling: factor of the scores.
        window: a query sees itself and so many tokens less one before it; 0: all before it.
        softcap: scores become ``softcap tanh(scores / softcap)``; 0: they stay.

    Returns:
        [T, heads, D], contiguous; 0 where a query has no key.

    Raises:
        NotImplementedError: values are not as wide as keys, or heads too wide for this GPU.
    """
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        raise NotImplementedError(
            "attention whose values are not as wide as its keys is not packed"
        )
    heads, tokens, width = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    repeats = heads // key.shape[0]
    group = next(g for g in (8, 7, 6, 5, 4, 3, 2, 1) if repeats % g == 0)
    segments = len(borders.query_borders) - 1
    index = borders.key_index if borders.shared else borders.key_starts  # which nobody reads
    out = torch.empty(tokens, heads, width, dtype=query.dtype, device=query.device)
    padded = max(16, triton.next_power_of_2(width))
    kind = (tokens / segments * group > TALL, query.dtype, padded, borders.shared)
    for rows, keys, warps, stages in _shapes(*kind):
        blocks = triton.cdiv(borders.longest_query, rows // group)
        try:
            with torch.cuda.device(query.device):
                _segments[segments * blocks, heads // group](
                    *(query, key, value, out),
                    *(borders.query_borders, borders.key_starts, borders.key_ends, index),
                    *(blocks, scaling, window, softcap),
                    *(query.stride(0), query.stride(1), key.stride(0), key.stride(1)),
                    *(value.stride(0), value.stride(1)),
                    GROUP=group,
                    GROUPS=repeats // group,
                    WIDTH=width,
                    PADDED_WIDTH=padded,
                    ROWS=rows,
                    KEYS=keys,
                    SHARED=borders.shared,
                    WINDOW=window > 0,
                    CAPPED=softcap > 0,
                    num_warps=warps,
                    num_stages=stages,
                )
        except OutOfResources:
            _too_large.add((*kind, (rows, keys, warps, stages)))
        else:
            return out
    raise NotImplementedError(f"attention of heads {width} wide does not fit this GPU")


Shape = tuple[int, int, int, int]
_too_large: set[tuple[bool, torch.dtype, int, bool, Shape]] = set()
"""What this process has found to need more shared memory than there is."""


def _shapes(tall: bool, dtype: torch.dtype, padded: int, shared: bool) -> list[Shape]:
    """Rows and keys of a block, warps and stages: the fastest, then what wide heads fit into.

    The first is the best of 60 on an H100, or within some percent of it, for segments of five tasks
    and three head counts (docs/benchmarks/README.md).
    """
    shapes = [(16, 32, 4, 1), (16, 16, 4, 1)]
    if dtype != torch.float32:
        shapes = [(16, 16, 2, 2), (16, 16, 2, 1)]
        if tall:
            shapes = [(64, 32, 4, 3), (64, 32, 4, 2), (32, 32, 4, 1), *shapes]
    return [shape for shape in shapes if (tall, dtype, padded, shared, shape) not in _too_large]
