"""The last block at the scored places only.

Above it nothing else is read. So its queries, its output projection and its MLP are needed at those
places only, its keys and values everywhere. It runs twice, through its own forward: with all tokens
up to where attention begins, which keeps keys and values; and with the scored tokens, whose queries
meet what was kept.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from zo_core.zo import attention
from zo_core.zo.attention import AttentionAgainError, Borders, KeysReached
from zo_core.zo.packing import Packing
from zo_core.zo.paired import NotTokenwiseError, token_axis


@contextmanager
def at_places(block: nn.Module, places: torch.Tensor, tokens: int) -> Iterator[None]:
    """Within, a block computes what it gives at some places; elsewhere it gives 0.

    Args:
        block: the block. One whose attention is not reached, or more than once, gives everything.
        places: int64 [U], in the packed row; any may come twice.
        tokens: of the packed row.
    """
    forward, own = block.forward, block.__dict__.get("forward")

    def pick(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(pick, value))
        try:
            axis = token_axis(value, tokens)
        except NotTokenwiseError:
            return value
        return value.index_select(axis, places)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with attention.until_keys():
                return forward(*args, **kwargs)  # a block without attention
        except KeysReached as reached:
            kept = reached.key, reached.value
        queries = _queries_at(attention.current(), places)
        try:
            with attention.over(queries), attention.against(*kept):
                found = forward(*map(pick, args), **{n: pick(v) for n, v in kwargs.items()})
        except AttentionAgainError:
            return forward(*args, **kwargs)
        if isinstance(found, tuple):
            return (_spread(found[0], places, tokens), *found[1:])
        return _spread(found, places, tokens)

    block.forward = run
    try:
        yield
    finally:
        if own is None:
            del block.forward  # uncovers the class's own
        else:
            block.forward = own


def _spread(rows: torch.Tensor, places: torch.Tensor, tokens: int) -> torch.Tensor:
    """Rows [..., U, H] at their places of [..., T, H]."""
    whole = rows.new_zeros(*rows.shape[:-2], tokens, rows.shape[-1])
    return whole.index_copy_(-2, places, rows)


@dataclass(slots=True)
class _Queries:
    """Segments of one query each; see :class:`~zo_core.zo.attention.Borders`."""

    shared: bool
    query_borders: torch.Tensor
    key_starts: torch.Tensor
    key_ends: torch.Tensor
    key_index: torch.Tensor
    longest_query: int = 1


def _queries_at(borders: Borders, places: torch.Tensor) -> Borders:
    """The queries at some places of a packed row, with the keys that each sees."""
    if isinstance(borders, Packing) and not places.is_cuda:
        return _runs_of(borders, places.tolist())
    ends = borders.query_borders[1:]
    whose = torch.searchsorted(ends, places.to(torch.int32), right=True)
    behind = ends[whose] - 1 - places.to(torch.int32)
    return _Queries(
        shared=borders.shared,
        query_borders=torch.arange(len(places) + 1, dtype=torch.int32, device=places.device),
        key_starts=borders.key_starts[whose],
        key_ends=borders.key_ends[whose] - behind,
        key_index=borders.key_index if borders.shared else borders.key_starts,
    )


def _runs_of(packing: Packing, places: list[int]) -> Packing:
    """The same where keys are gathered: places that follow each other are one segment."""
    starts = list(accumulate(packing.query_lengths, initial=0))
    lengths: list[int] = []
    keys: list[range | tuple[int, ...]] = []
    before = None
    for place in places:
        segment = bisect_right(starts, place) - 1
        if before == (segment, place - 1):
            lengths[-1] += 1
        else:
            lengths.append(1)
            keys.append(())
        seen = packing.keys[segment]
        keys[-1] = seen[: len(seen) - (starts[segment + 1] - place) + 1]
        before = segment, place
    return Packing(packing.device, tuple(lengths), tuple(keys))
