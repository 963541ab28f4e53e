"""CUDA graphs of the packed forward pass, one for each bucket of batch sizes.

A step launches several hundred kernels; replayed from a graph they cost the host one call. A graph
has fixed shapes and addresses, so a batch is laid into the static tensors of its *bucket*: token,
segment and scored-place counts rounded up. What the rounding adds is one more segment, which
nothing else sees and nobody scores. Graph or not, the kernels and their shapes are the same, and
so are the bits.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from zo_core.zo.attention import Copies
from zo_core.zo.packing import Packing

FINEST = 16
"""Tokens are rounded up to a multiple of this."""

STEPS = 128
"""Further up, buckets are this share of their power of two apart: at most 1 % of padding. There a
bucket that comes once, and so has no graph, loses little: its kernels take longer than launching
them."""

CAPTURE_AT = 2
"""A bucket is captured when it is seen for this time: rare ones are not worth it."""

MOST_GRAPHS = 256

GROWTH = 1.25
"""Shared static tensors that are too small grow to at least so many times their size."""


def rounded(count: int, finest: int = FINEST) -> int:
    """The bucket of a count: a multiple of ``finest``, and for large counts a coarser one."""
    grain = max(finest, (1 << (count.bit_length() - 1)) // STEPS)
    return -(-count // grain) * grain


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rounded sizes of one copy of a packed row."""

    copies: int
    tokens: int
    segments: int
    keys: int
    places: int
    longest_query: int
    shared: bool
    cached: bool


@dataclass(slots=True)
class StaticPacking:
    """A packing in tensors that stay where they are; see :class:`~zo_core.zo.packing.Packing`."""

    shared: bool
    longest_query: int
    query_borders: torch.Tensor
    key_borders: torch.Tensor
    key_index: torch.Tensor

    @property
    def key_starts(self) -> torch.Tensor:
        """See :class:`~zo_core.zo.packing.Packing`."""
        return self.key_borders[:-1]

    @property
    def key_ends(self) -> torch.Tensor:
        """See :class:`~zo_core.zo.packing.Packing`."""
        return self.key_borders[1:]

    def first_of(self, copies: int) -> "StaticPacking":
        """The first copy of so many."""
        segments = (len(self.query_borders) - 1) // copies
        return StaticPacking(
            *(self.shared, self.longest_query),
            *(self.query_borders[: segments + 1], self.key_borders[: segments + 1]),
            self.key_index[: len(self.key_index) // copies],
        )


@dataclass(slots=True)
class Row:
    """A packed row that holds some copies of a batch side by side, as the model takes it."""

    ids: torch.Tensor
    """int64 [1, copies x T]."""
    positions: torch.Tensor
    """int64 [1, copies x T]."""
    places: torch.Tensor
    """int64 [copies x U]: packed places whose logits are wanted."""
    hidden: torch.Tensor | None
    """Input of the lowest tuned layer, [1, copies x T, H]."""
    packing: Copies
    copies: int


@dataclass(slots=True)
class Slots:
    """The static row of a bucket, its graph once captured, and the graph's output."""

    row: Row
    borders: torch.Tensor
    """int32 [2, copies x segments + 1]: those of queries and keys."""
    key_index: torch.Tensor
    """int64 [copies, keys]; empty where none are shared."""
    starts: torch.Tensor
    """int64 [copies, 1]: where each copy begins."""
    seen: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    output: torch.Tensor | None = None


Run = Callable[[Row], torch.Tensor]


class GraphedForward:
    """Runs a forward function on bucketed batches, from a CUDA graph where one is worth it."""

    def __init__(
        self,
        run: Run,
        device: torch.device,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Wrap a function.

        Args:
            run: (row) -> logits [copies x U, V]; launches only, without synchronising.
            device: a CUDA device.
            hidden_size: H.
            dtype: of the hidden states.
        """
        self._run = run
        self._device = device
        self._slots: dict[Bucket, Slots] = {}
        self._pool: Any = None
        self._input = torch.empty(1, 0, hidden_size, dtype=dtype, device=device)
        """Static hidden states; buckets share them, as one runs at a time."""
        self.capture = True
        """Whether graphs are used; off, the same buckets run launch by launch."""

    def release(self) -> bool:
        """Give up graphs and static tensors for good; whether there were any to give up."""
        self.capture, had = False, self.capture
        self._slots.clear()
        self._input = self._input[:, :0].clone()
        return had

    @property
    def graphs(self) -> int:
        """How many graphs have been captured."""
        return sum(slots.graph is not None for slots in self._slots.values())

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        hidden: torch.Tensor | None,
        packing: Packing,
        copies: int,
    ) -> torch.Tensor:
        """Logits [copies x U, V].

        Args:
            ids: int64 [1, T].
            positions: int64 [1, T].
            places: int64 [U], packed places to score.
            hidden: [1, T, H], or None.
            packing: of one copy.
            copies: how many copies of the row run side by side.
        """
        count = len(places)
        bucket = self._bucket(ids.shape[1], count, hidden is not None, packing, copies)
        slots = self._slots.get(bucket)
        if slots is None:
            slots = self._allocate(bucket)
            if self.capture:
                self._slots[bucket] = slots
        self._fill(slots, bucket, ids, positions, places, hidden, packing)
        slots.seen += 1
        if slots.graph is None and self.capture and slots.seen >= CAPTURE_AT:
            self._capture(slots)
        if slots.graph is not None and self.capture:
            slots.graph.replay()
            assert slots.output is not None
            output = slots.output
        else:
            output = self._run(slots.row)
        # A copy: the next replay overwrites the graph's output.
        return output.unflatten(0, (copies, bucket.places))[:, :count].flatten(0, 1).clone()

    def _bucket(
        self, tokens: int, places: int, cached: bool, packing: Packing, copies: int
    ) -> Bucket:
        room = rounded(tokens)
        extra = sum(packing.key_lengths) - tokens
        keys = room + rounded(extra) if packing.shared else room
        return Bucket(
            copies=copies,
            tokens=room,
            segments=rounded(len(packing.query_lengths), 16) + 1,
            keys=keys,
            places=rounded(places, 16),
            longest_query=rounded(max(packing.longest_query, room - tokens), 64),
            shared=packing.shared,
            cached=cached,
        )

    def _allocate(self, bucket: Bucket) -> Slots:
        copies = bucket.copies

        def ints(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        borders = ints(2, copies * bucket.segments + 1, dtype=torch.int32)
        key_index = ints(copies, bucket.keys if bucket.shared else 0)
        starts = torch.arange(copies, device=self._device) * bucket.tokens
        packing = StaticPacking(
            *(bucket.shared, bucket.longest_query, borders[0], borders[1], key_index.flatten())
        )
        row = Row(
            ids=ints(1, copies * bucket.tokens),
            positions=ints(1, copies * bucket.tokens),
            # Of each copy its first token, so that spare places are pairs, too.
            places=starts.repeat_interleave(bucket.places),
            hidden=self._hidden(copies * bucket.tokens) if bucket.cached else None,
            packing=packing,
            copies=copies,
        )
        return Slots(row, borders, key_index, starts[:, None])

    def _hidden(self, tokens: int) -> torch.Tensor:
        """Hidden states [1, tokens, H] at the start of what all buckets share."""
        held, width = self._input.shape[1:]
        if held < tokens:  # graphs of smaller buckets keep the place they were captured with
            room = max(tokens, round(GROWTH * held))
            self._input = self._input.new_zeros(1, room, width)
        return self._input[:, :tokens]

    def _fill(
        self,
        slots: Slots,
        bucket: Bucket,
        ids: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        hidden: torch.Tensor | None,
        packing: Packing,
    ) -> None:
        tokens, copies, row = ids.shape[1], bucket.copies, slots.row
        row.ids.view(copies, -1)[:, :tokens] = ids
        row.positions.view(copies, -1)[:, :tokens] = positions
        torch.add(places, slots.starts, out=row.places.view(copies, -1)[:, : len(places)])
        if row.hidden is not None and hidden is not None:
            row.hidden.view(copies, bucket.tokens, -1)[:, :tokens] = hidden
        borders = [
            _borders(packing.query_lengths, bucket.tokens, bucket.segments, copies),
            _borders(
                packing.key_lengths,
                bucket.keys if bucket.shared else bucket.tokens,
                bucket.segments,
                copies,
            ),
        ]
        self._send(torch.tensor(borders, dtype=torch.int32), slots.borders)
        if bucket.shared:
            # What no segment reads must be a token all the same; a full bucket has none to spare.
            spare = min(tokens, bucket.tokens - 1)
            found = torch.full((bucket.keys,), spare, dtype=torch.int64)
            known = [k for keys in packing.keys for k in keys]
            found[: len(known)] = torch.tensor(known)
            offsets = torch.arange(copies)[:, None] * bucket.tokens
            self._send(found + offsets, slots.key_index)

    def _send(self, values: torch.Tensor, place: torch.Tensor) -> None:
        """Values of the host to a static place, without waiting for the copy."""
        pinned = values.pin_memory() if self._device.type == "cuda" else values
        place.copy_(pinned, non_blocking=True)

    def _capture(self, slots: Slots) -> None:
        if self.graphs >= MOST_GRAPHS:
            return
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        full: list[str] = []
        try:
            # Leaving a capture that failed raises before it goes back to this stream.
            with (
                _no_garbage_collection(),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                # Of this thread only: the worker's own asks for free memory meanwhile, which would
                # end it.
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                try:
                    slots.output = self._run(slots.row)
                except torch.OutOfMemoryError as error:
                    full.append(str(error))
                    raise
        except RuntimeError as error:
            if not full:
                raise
            # Whatever the broken capture complains of: this is why it broke.
            raise torch.OutOfMemoryError(full[0]) from error
        slots.graph = graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep garbage until later: freeing what an earlier run left on the device ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _borders(lengths: Sequence[int], total: int, segments: int, copies: int) -> list[int]:
    """Borders of all copies: the segments, empty ones up to the bucket's number, and the rest."""
    one = [0, *accumulate(lengths)]
    one += [one[-1]] * (segments - 1 - len(lengths))
    return [copy * total + border for copy in range(copies) for border in one] + [copies * total]
