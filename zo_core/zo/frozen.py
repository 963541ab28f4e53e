"""The frozen layers below the lowest tuned one: run once per example, then remembered."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from zo_core.models.decoder import hidden_of
from zo_core.models.load import LoadedModel
from zo_core.models.memory import CACHE_SHARE, CPU_CACHE
from zo_core.tasks.scoring import batches
from zo_core.tasks.templates import Example
from zo_core.zo.attention import packed
from zo_core.zo.packing import Packing, pack

CHUNK = 32
"""Examples whose frozen prefix is computed together. Chunks are fixed by the order of the data, so
a resumed run fills its cache with the same bits as an uninterrupted one."""


class FrozenLayers:
    """What the layers below the lowest tuned one say of every example."""

    def __init__(
        self, loaded: LoadedModel, layer: int, budget: int | None, chunk: int = CHUNK
    ) -> None:
        """Wrap a loaded model; arguments as of :class:`~zo_core.zo.forward.FastForward`."""
        self._loaded = loaded
        self._layer = layer
        self._chunk = chunk
        self._budget = _default_budget(loaded.device) if budget is None else budget
        self._chunks: dict[int, tuple[Example, ...]] = {}
        self._cache: dict[int, torch.Tensor] = {}
        self._emptied = self._on_host = False
        self._returned = 0
        """How many values a block returns in a tuple; 0 if it returns the hidden states alone."""

    def begin_at(self, layer: int) -> None:
        """Freeze the layers below another one from now on; nothing may be registered."""
        assert not self._chunks, "cached prefixes belong to one layer"
        self._layer = layer

    def see(self, _module: nn.Module, _args: Any, output: object) -> None:
        """A forward hook for a block: note in what form it returns the hidden states."""
        self._returned = len(output) if isinstance(output, tuple | list) else 0

    def register(self, examples: Sequence[Example]) -> None:
        """Announce a data set whose prefixes are to be cached, if they fit the budget.

        Entries are held by example, not by text: an entry's bits depend on its chunk alone, so
        they are the same whichever batch asks first. Call once per data set, before any batch.
        """
        if not self._layer:
            return
        size = self._loaded.info.hidden_size * self._loaded.dtype.itemsize
        need = sum(len(r) for e in examples for r in e.rows) * size
        if need > self._budget:
            return
        self._budget -= need
        self._divide(examples, self._chunk)

    def _divide(self, examples: Sequence[Example], chunk: int) -> None:
        for part in batches(len(examples), chunk):
            members = tuple(examples[i] for i in part)
            self._chunks.update({id(e): members for e in members})

    def limit(self, examples: int, rows: Sequence[Example]) -> None:
        """Compute the prefixes of at most so many rows of a data set together, cached ones anew.

        Other data sets keep their chunks, and so their bits.
        """
        if examples >= self._chunk or not rows or id(rows[0]) not in self._chunks:
            return
        self._divide(rows, examples)
        for example in rows:
            self._cache.pop(id(example), None)

    def give_up(self) -> str | None:
        """Free device memory; what was given up, in words, or None if nothing is left to give.

        First the entries go, to be made again as they are asked for; then they live on the host.
        They are the same bits wherever they are, however often they are made.
        """
        if self._on_host or not self._chunks:
            return None
        if self._cache and not self._emptied:
            self._emptied = True
            self._cache.clear()
            return "prefix cache emptied"
        self._on_host = True
        self._cache = {which: self._kept(hidden) for which, hidden in self._cache.items()}
        return "prefix cache moved to host memory"

    def output(
        self,
        examples: Sequence[Example],
        ids: torch.Tensor,
        positions: torch.Tensor,
        packing: Packing,
        start: int,
    ) -> torch.Tensor | None:
        """Input of the lowest tuned layer, [1, T, H], for a packed batch; None for layer 0.

        Args:
            examples: the batch.
            ids: int64 [1, T].
            positions: int64 [1, T].
            packing: of the batch.
            start: tokens of each example that the row holds once; see
                :func:`~zo_core.zo.packing.pack`.
        """
        if not self._layer:
            return None
        if any(id(e) not in self._chunks for e in examples):
            return self._run_prefix(ids, positions, packing)
        for example in examples:
            if id(example) not in self._cache:
                self._fill(self._chunks[id(example)])
        device = self._loaded.device
        parts = [self._cache[id(e)].to(device, non_blocking=True) for e in examples]
        return torch.cat([parts[0], *(part[:, start:] for part in parts[1:])], dim=1)

    def _fill(self, chunk: tuple[Example, ...]) -> None:
        ids, positions, packing, _ = pack([e.rows for e in chunk], self._loaded.device)
        hidden = self._run_prefix(ids, positions, packing)
        start = 0
        for example in chunk:
            _, _, own, _ = pack([example.rows], torch.device("cpu"))
            self._cache[id(example)] = self._kept(hidden[:, start : start + own.tokens])
            start += own.tokens

    def _kept(self, hidden: torch.Tensor) -> torch.Tensor:
        """A copy for the cache, on the device or in host memory that the device reads directly."""
        if not self._on_host:
            return hidden.clone()
        pinned = self._loaded.device.type == "cuda"
        return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=pinned).copy_(hidden)

    @torch.no_grad()
    def _run_prefix(
        self, ids: torch.Tensor, positions: torch.Tensor, packing: Packing
    ) -> torch.Tensor:
        """Input of the lowest tuned layer, [1, T, H]: the model runs up to there and stops."""
        blocks = self._loaded.decoder.blocks

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        handles = [
            blocks[0].register_forward_hook(self.see),
            blocks[self._layer].register_forward_pre_hook(stop, with_kwargs=True),
        ]
        try:
            with packed(self._loaded.model, packing):
                self._loaded.model(input_ids=ids, position_ids=positions, use_cache=False)
        except _Reached as reached:
            return hidden_of(reached.hidden)
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError(f"the model never reached layer {self._layer}")

    @contextmanager
    def skipped(self, hidden: torch.Tensor | None) -> Iterator[None]:
        """Within, the model skips the frozen blocks and starts from ``hidden``."""
        if hidden is None:
            yield
            return
        blocks = self._loaded.decoder.blocks

        def enter(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        skip = partial(_skip, returned=self._returned)
        for block in blocks[: self._layer]:
            block.forward = skip
        handle = blocks[self._layer].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for block in blocks[: self._layer]:
                del block.forward  # uncovers the class's own


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Carries the hidden states out of a forward pass that need not go on."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _skip(hidden_states: torch.Tensor, *_args: Any, returned: int, **_kwargs: Any) -> object:
    """Stand-in for a frozen block's forward."""
    return (hidden_states, *[None] * (returned - 1)) if returned else hidden_states


def _default_budget(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // CACHE_SHARE
    return CPU_CACHE
