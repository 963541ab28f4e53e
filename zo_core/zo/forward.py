"""From examples to logits: the reference path and the fast path, equal to rounding.

Both run the model's own modules; neither re-implements an architecture.

* :class:`ReferenceForward` is what the papers do: one row for every candidate, left padding, the
  whole model, logits at every position.
* :class:`FastForward` does only the work that the result depends on. Layers below the lowest tuned
  one are frozen, so their output is computed once per example and cached; candidates that are
  single tokens share one row; sequences are padded on the right, where causal attention makes a
  mask needless; logits are computed at the scored places only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from zo_core.models.decoder import hidden_of
from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import Scored, batches, layout
from zo_core.tasks.templates import Example
from zo_core.zo.scope import Point, TunedScope

CHUNK = 32
"""Examples whose frozen prefix is computed together. Chunks are fixed by the order of the data, so
a resumed run fills its cache with the same bits as an uninterrupted one."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch ready to be run any number of times."""

    input_ids: torch.Tensor
    """int64 [R, T]."""
    mask: torch.Tensor | None
    """int64 [R, T], 1 at real tokens; None with right padding."""
    hidden: torch.Tensor | None
    """Input of the lowest tuned layer, [R, T, H]; None if it is not cached."""
    scored: Scored


class Forward(Protocol):
    """A way to get logits."""

    name: str

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """Lay a batch out."""

    def logits(self, prepared: Prepared) -> torch.Tensor:
        """Logits [U, V] at the batch's scored places, with the weights as they are now."""

    def logits_at(
        self, prepared: Prepared, scope: TunedScope, points: Sequence[Point]
    ) -> list[torch.Tensor]:
        """Logits [U, V] at every point; the working weights are left in an unspecified state."""


def _one_by_one(
    forward: Forward, prepared: Prepared, scope: TunedScope, points: Sequence[Point]
) -> list[torch.Tensor]:
    """Logits at every point, one forward pass each."""
    found = []
    for point in points:
        scope.perturb(point)
        found.append(forward.logits(prepared))
    return found


def _pad(
    rows: Sequence[Sequence[int]], left: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded token ids and mask, both int64 [R, T]. Padding is token 0: it is never attended to."""
    width = max(map(len, rows))
    pads = [[0] * (width - len(r)) for r in rows]
    ids = [p + list(r) if left else list(r) + p for r, p in zip(rows, pads, strict=True)]
    mask = [
        [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p)
        for r, p in zip(rows, pads, strict=True)
    ]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class ReferenceForward:
    """Plain Hugging Face forward, batch x candidates rows, left padding, full logits."""

    name = "reference"

    def __init__(self, loaded: LoadedModel) -> None:
        """Wrap a loaded model."""
        self._loaded = loaded

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """Lay a batch out: one left-padded row for every candidate."""
        width = max(len(c.tokens) for e in examples for c in e.candidates)
        rows, scored = layout(
            examples,
            rows_of=lambda e: [c.tokens for c in e.candidates],
            place_of=lambda row, at: width - len(row) + at,
            device=self._loaded.device,
        )
        ids, mask = _pad(rows, left=True, device=self._loaded.device)
        return Prepared(ids, mask, None, scored)

    def logits(self, prepared: Prepared) -> torch.Tensor:
        """Logits [U, V] at the scored places, with gradients where a weight requires them."""
        assert prepared.mask is not None
        output = self._loaded.model(
            input_ids=prepared.input_ids,
            attention_mask=prepared.mask,
            position_ids=(prepared.mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        )
        return output.logits[prepared.scored.row, prepared.scored.position]

    def logits_at(
        self, prepared: Prepared, scope: TunedScope, points: Sequence[Point]
    ) -> list[torch.Tensor]:
        """Logits [U, V] at every point, one forward pass each."""
        return _one_by_one(self, prepared, scope, points)


class FastForward:
    """Frozen prefix cached, shared rows, right padding, logits at scored places only."""

    name = "fast"

    def __init__(
        self, loaded: LoadedModel, layer: int = 0, budget: int | None = None, chunk: int = CHUNK
    ) -> None:
        """Wrap a loaded model.

        Args:
            loaded: the model.
            layer: the lowest tuned layer (0-based); the blocks below it are run once per example.
                0 runs the whole model each time.
            budget: bytes the cache may take; None: 512 MiB on a CPU, a fifth of a GPU.
            chunk: examples whose prefix is computed together.
        """
        self._loaded = loaded
        self._layer = layer
        self._chunk = chunk
        self._budget = _default_budget(loaded.device) if budget is None else budget
        self._chunks: dict[int, tuple[Example, ...]] = {}
        self._cache: dict[int, list[torch.Tensor]] = {}
        self._returned = 0
        """How many values a block returns in a tuple; 0 if it returns the hidden states alone."""

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
        for chunk in batches(len(examples), self._chunk):
            members = tuple(examples[i] for i in chunk)
            self._chunks.update({id(e): members for e in members})

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """Lay a batch out and find its prefix in the cache, or compute it."""
        rows, scored = layout(
            examples,
            rows_of=lambda e: e.rows,
            place_of=lambda _row, at: at,
            device=self._loaded.device,
        )
        ids, _ = _pad(rows, left=False, device=self._loaded.device)
        return Prepared(ids, None, self._prefix(examples, ids), scored)

    @torch.no_grad()
    def logits(self, prepared: Prepared) -> torch.Tensor:
        """Logits [U, V] at the scored places."""
        scored = prepared.scored

        def keep_scored(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][scored.row, scored.position], *args[1:])

        head = self._loaded.model.get_output_embeddings()  # type: ignore[operator]
        handle = head.register_forward_pre_hook(keep_scored)
        try:
            with self._suffix_only(prepared.hidden):
                output = self._loaded.model(input_ids=prepared.input_ids, use_cache=False)
            return output.logits
        finally:
            handle.remove()

    def logits_at(
        self, prepared: Prepared, scope: TunedScope, points: Sequence[Point]
    ) -> list[torch.Tensor]:
        """Logits [U, V] at every point."""
        return _one_by_one(self, prepared, scope, points)

    def _prefix(self, examples: Sequence[Example], ids: torch.Tensor) -> torch.Tensor | None:
        if not self._layer:
            return None
        if any(id(e) not in self._chunks for e in examples):
            return self._run_prefix(ids)
        for example in examples:
            if id(example) not in self._cache:
                self._fill(self._chunks[id(example)])
        states = [h for e in examples for h in self._cache[id(e)]]
        return nn.utils.rnn.pad_sequence(states, batch_first=True)

    def _fill(self, chunk: tuple[Example, ...]) -> None:
        ids, _ = _pad([r for e in chunk for r in e.rows], left=False, device=self._loaded.device)
        hidden = iter(self._run_prefix(ids))
        for example in chunk:
            self._cache[id(example)] = [next(hidden)[: len(r)].clone() for r in example.rows]

    @torch.no_grad()
    def _run_prefix(self, ids: torch.Tensor) -> torch.Tensor:
        """Input of the lowest tuned layer, [R, T, H]: the model runs up to there and stops."""
        blocks = self._loaded.decoder.blocks

        def see(_module: nn.Module, _args: Any, output: object) -> None:
            self._returned = len(output) if isinstance(output, tuple | list) else 0

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        handles = [
            blocks[0].register_forward_hook(see),
            blocks[self._layer].register_forward_pre_hook(stop, with_kwargs=True),
        ]
        try:
            self._loaded.model(input_ids=ids, use_cache=False)
        except _Reached as reached:
            return hidden_of(reached.hidden)
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError(f"the model never reached layer {self._layer}")

    @contextmanager
    def _suffix_only(self, hidden: torch.Tensor | None) -> Iterator[None]:
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
        return torch.cuda.get_device_properties(device).total_memory // 5
    return 512 * 2**20
