"""Packing: the token rows of a batch as one row without padding.

A packed batch is a list of *segments* laid end to end in one row of T tokens. A segment is a whole
sequence, or what a row adds to the start that it shares with another (a candidate to its prompt, an
example to its template): then its queries also see the keys of that start, which are computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from zo_core.upload import upload

WORTH_SHARING = 0.02
"""Attention over keys that segments share takes longer: up to 1 % of a pass on an H100, and on a
CPU it needs a mask."""


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

    @property
    def key_starts(self) -> torch.Tensor:
        """int32 [S]: likewise."""
        return self.key_borders[:-1]

    @property
    def key_ends(self) -> torch.Tensor:
        """int32 [S]: where they end."""
        return self.key_borders[1:]

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

    @cached_property
    def _visible(self) -> dict[int, torch.Tensor | None]:
        return {}

    def visible(self, window: int) -> torch.Tensor | None:
        """Which keys, bool [S, 1, Lq, Lk], a padded query sees; None if plain causal says it all.

        Args:
            window: a query sees itself and so many tokens less one before it; 0: all before it.
        """
        if window not in self._visible:
            self._visible[window] = self._seen_within(window)
        return self._visible[window]

    def _seen_within(self, window: int) -> torch.Tensor | None:
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
    rows: Sequence[Sequence[tuple[int, ...]]], device: torch.device, start: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Packing, torch.Tensor]:
    """Lay token rows end to end; within a group, a row adds only what follows the common start.

    Args:
        rows: groups (examples) of token rows.
        device: where tensors go.
        start: how many tokens of :func:`shared_start` the first group has for all others, too.

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
            known = places[first_of_group if number else 0] if places else ()
            common = common_start(group[0], row) if number else start if places else 0
            own = range(len(ids), len(ids) + len(row) - common)
            places.append((*known[:common], *own))
            if not own:
                continue
            ids += row[common:]
            positions += range(common, len(row))
            lengths.append(len(own))
            keys.append(places[-1] if common else own)
    packing = Packing(device, tuple(lengths), tuple(keys))
    (both,) = upload([torch.tensor([ids, positions])], device)
    return both[:1], both[1:], packing, _padded(places, torch.device("cpu"))


def shared_start(rows: Sequence[Sequence[tuple[int, ...]]]) -> int:
    """How many tokens that all groups begin with, a template or a BOS token, are computed once.

    0 where that saves less than :data:`WORTH_SHARING` of the tokens.
    """
    firsts = [group[0] for group in rows]
    start = min(common_start(firsts[0], row) for row in firsts)
    saved = start * (len(rows) - 1)
    return start if saved >= WORTH_SHARING * sum(map(len, firsts)) else 0


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common start of two token rows."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _borders(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return upload([torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)], device)[0]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return upload([torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])], device)[0]
