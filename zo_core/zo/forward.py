"""From examples to logits: the reference path and the fast path, equal to rounding.

Both run the model's own modules; neither re-implements an architecture.

* :class:`ReferenceForward` is what the papers do: one row for every candidate, left padding, the
  whole model, logits at every position.
* :class:`FastForward` does only the work that the result depends on. Layers below the lowest tuned
  one are frozen, so their output is computed once per example and cached; token rows are packed
  without padding, and the candidates of a prompt share its computation; the points
  ``theta + eps z`` and ``theta - eps z`` differ in the tuned layer only and run above it as one
  batch; logits, and the last block above its keys, are computed at the scored places only.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from zo_core.models.load import LoadedModel
from zo_core.models.memory import PAIRED_SHARE
from zo_core.tasks.scoring import Scored, layout
from zo_core.tasks.templates import Example
from zo_core.zo.attention import packed
from zo_core.zo.fp8 import PairsInFp8, standing_in
from zo_core.zo.frozen import CHUNK, FrozenLayers
from zo_core.zo.graphs import GraphedForward, Row
from zo_core.zo.last_block import at_places
from zo_core.zo.packing import Packing, pack
from zo_core.zo.paired import NotTokenwiseError, paired
from zo_core.zo.points import Owed, move_to, write_points
from zo_core.zo.scope import Point, TunedScope


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch ready to be run any number of times."""

    input_ids: torch.Tensor
    """int64 [R, T]; R is 1 when packed."""
    mask: torch.Tensor | None
    """int64 [R, T], 1 at real tokens; None when packed."""
    scored: Scored
    positions: torch.Tensor
    """int64 [R, T]: places of the tokens in their sequences."""
    packing: Packing | None = None
    hidden: torch.Tensor | None = None
    """Input of the lowest tuned layer, [1, T, H]; None if no layer is frozen below."""


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

    def give_up(self) -> str | None:
        """Free device memory for good without changing a bit of what is computed.

        Returns:
            What was given up, in words; None if there is nothing left.
        """

    def limit(self, examples: int, rows: Sequence[Example]) -> None:
        """Hear that no forward pass over a data set will hold more examples than this."""


def _one_by_one(
    forward: Forward, prepared: Prepared, scope: TunedScope, points: Sequence[Point]
) -> list[torch.Tensor]:
    """Logits at every point, one forward pass each."""
    found = []
    for point in points:
        move_to(scope, point)
        found.append(forward.logits(prepared))
    return found


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
        pads = [width - len(r) for r in rows]
        ids = torch.tensor([[0] * p + list(r) for p, r in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * p + [1] * len(r) for p, r in zip(pads, rows, strict=True)])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        device = self._loaded.device
        return Prepared(ids.to(device), mask.to(device), scored, positions.to(device))

    def logits(self, prepared: Prepared) -> torch.Tensor:
        """Logits [U, V] at the scored places, with gradients where a weight requires them."""
        output = self._loaded.model(
            input_ids=prepared.input_ids,
            attention_mask=prepared.mask,
            position_ids=prepared.positions,
            use_cache=False,
        )
        return output.logits[prepared.scored.row, prepared.scored.position]

    def logits_at(
        self, prepared: Prepared, scope: TunedScope, points: Sequence[Point]
    ) -> list[torch.Tensor]:
        """Logits [U, V] at every point, one forward pass each."""
        return _one_by_one(self, prepared, scope, points)

    def give_up(self) -> str | None:
        """Nothing is held between two passes."""
        return None

    def limit(self, examples: int, rows: Sequence[Example]) -> None:
        """A pass holds what it is given."""


class FastForward:
    """Frozen prefix cached, no padding, shared suffix, logits at scored places only."""

    name = "fast"

    def __init__(
        self,
        loaded: LoadedModel,
        layer: int = 0,
        budget: int | None = None,
        chunk: int = CHUNK,
        graphs: bool = False,
        compiled: bool = False,
        tuned: Collection[str] = (),
        fp8: bool = False,
    ) -> None:
        """Wrap a loaded model.

        Args:
            loaded: the model.
            layer: the lowest tuned layer (0-based); the blocks below it are run once per example.
                0 runs the whole model each time.
            budget: bytes the cache may take; None: 512 MiB on a CPU, a fifth of a GPU.
            chunk: examples whose prefix is computed together.
            graphs: lay batches into buckets and replay CUDA graphs of them.
            compiled: run the frozen blocks above the tuned layer through ``torch.compile``, and
                those that are tuned for the most part where points run side by side.
            tuned: names of the tuned parameters; other blocks that hold one are not compiled.
            fp8: run pairs of points through the frozen blocks above the tuned layer in fp8.
        """
        self._loaded = loaded
        prefix = loaded.decoder.prefix
        blocks = loaded.decoder.blocks
        of_block = {i: f"{prefix}.{i}." for i in range(len(blocks))}
        held = {i for i, own in of_block.items() if any(n.startswith(own) for n in tuned)}
        self._compiled = {
            block: torch.compile(block.forward, dynamic=True)
            for i, block in enumerate(blocks)
            if compiled and i > layer and i not in held
        }
        self._whole = {
            f"{prefix}.{i}": torch.compile(blocks[i].forward, dynamic=True)
            for i in held
            if compiled and _mostly(tuned, of_block[i], blocks[i])
        }
        """Compiled tuned blocks, by name."""
        last = max(held, default=layer)
        eight = blocks[last + 1 :]
        self.fp8 = PairsInFp8(loaded.model, eight, blocks, compiled) if fp8 else None
        """The suffix in fp8, if it was asked for; taken away, pairs run as the model does."""
        self._graphed = (
            GraphedForward(
                self._launch,
                loaded.device,
                loaded.info.hidden_size,
                loaded.dtype,
            )
            if graphs
            else None
        )
        self._weights: dict[str, list[torch.Tensor]] = {}
        """Weights of the tuned parameters at the points in progress; their addresses stay."""
        self._frozen = FrozenLayers(loaded, layer, budget, chunk)
        self._tokenwise = True
        self._watched = False

    def register(self, examples: Sequence[Example]) -> None:
        """Announce a data set; see :meth:`FrozenLayers.register`."""
        self._frozen.register(examples)

    def give_up(self) -> str | None:
        """The prefix cache in two steps, then the CUDA graphs with their static tensors."""
        if (given_up := self._frozen.give_up()) is not None:
            return given_up
        if self._graphed is not None and self._graphed.release():
            return "CUDA graphs given up"
        return None

    def limit(self, examples: int, rows: Sequence[Example]) -> None:
        """Compute the prefixes of so many of a data set's examples together at most, too."""
        self._frozen.limit(examples, rows)

    def use_graphs(self, on: bool) -> bool:
        """Switch CUDA graphs off or on again; the kernels stay the same, and so do the bits.

        Returns:
            Whether they were on.
        """
        if self._graphed is None:
            return False
        before, self._graphed.capture = self._graphed.capture, on
        return before

    @property
    def extras(self) -> str:
        """What a GPU adds to this path, in words."""
        graphs = ", CUDA graphs" if self._graphed else ""
        eight = f", {len(self.fp8)} linear layers above in fp8" if self.fp8 else ""
        return graphs + (", frozen blocks compiled" if self._compiled else "") + eight

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """Pack a batch and find its prefix in the cache, or compute it."""
        device = self._loaded.device
        ids, positions, packing, places = pack([e.rows for e in examples], device)
        _, scored = layout(
            examples,
            rows_of=lambda e: e.rows,
            place_of=lambda _row, at: at,
            device=torch.device("cpu"),
        )
        scored = replace(
            scored, row=torch.zeros_like(scored.row), position=places[scored.row, scored.position]
        ).to(device)
        hidden = self._frozen.output(examples, ids, positions, packing)
        return Prepared(ids, None, scored, positions, packing, hidden)

    def begin_at(self, layer: int) -> None:
        """Take another layer as the lowest tuned one, without compiled blocks or graphs.

        The prefix of a batch is then up to the caller: ``Prepared.hidden`` is the layer's input, as
        :meth:`trace` has seen it. Callers look at the blocks' outputs, so from then on the last
        block, too, computes all tokens.
        """
        assert not self._compiled, "blocks are compiled for one tuned layer"
        assert self._graphed is None, "graphs are captured for one tuned layer"
        self._watched = True
        self._frozen.begin_at(layer)

    @torch.no_grad()
    def trace(self, prepared: Prepared) -> torch.Tensor:
        """Logits [U, V] of a whole pass from layer 0, after which any layer can be begun at."""
        self.begin_at(0)
        handle = self._loaded.decoder.blocks[0].register_forward_hook(self._frozen.see)
        try:
            return self._run(replace(prepared, hidden=None), 1)
        finally:
            handle.remove()

    @torch.no_grad()
    def logits(self, prepared: Prepared) -> torch.Tensor:
        """Logits [U, V] at the scored places."""
        return self._run(prepared, 1)

    def pairs(self, scope: TunedScope) -> bool:
        """Whether the points of a scope run side by side, without touching its own weights."""
        held = sum(p.numel() for p in scope.parameters.values())
        return self._tokenwise and held <= PAIRED_SHARE * self._loaded.info.parameters

    @torch.no_grad()
    def logits_at(
        self,
        prepared: Prepared,
        scope: TunedScope,
        points: Sequence[Point],
        owed: Owed | None = None,
    ) -> list[torch.Tensor]:
        """Logits [U, V] at every point, with one suffix for all points where that is possible.

        Args:
            prepared: the batch.
            scope: the scope.
            points: n points.
            owed: see :func:`~zo_core.zo.points.write_points`; only where :meth:`pairs` is true.
        """
        if len(points) < 2 or not self.pairs(scope):
            return _one_by_one(self, prepared, scope, points)
        self._place_weights(scope, points, owed)
        try:
            return list(self._run(prepared, len(points)).chunk(len(points)))
        except NotTokenwiseError:
            self._tokenwise = False
            return _one_by_one(self, prepared, scope, points)

    def _place_weights(self, scope: TunedScope, points: Sequence[Point], owed: Owed | None) -> None:
        if {n: len(w) for n, w in self._weights.items()} != dict.fromkeys(
            scope.parameters, len(points)
        ):
            self._weights = {
                n: [torch.empty_like(p) for _ in points] for n, p in scope.parameters.items()
            }
        write_points(scope, points, self._weights, owed)

    def _run(self, prepared: Prepared, copies: int) -> torch.Tensor:
        """Logits [copies x U, V] of so many copies of the packed row, side by side."""
        assert prepared.packing is not None
        packing, scored, hidden = prepared.packing, prepared.scored, prepared.hidden
        ids, positions, where = prepared.input_ids, prepared.positions, scored.position
        if self._graphed is not None:
            return self._graphed(ids, positions, where, hidden, packing, copies)
        if copies > 1:
            where = torch.cat([where + copy * packing.tokens for copy in range(copies)])
            packing = packing.repeated(copies)
            ids, positions = ids.repeat(1, copies), positions.repeat(1, copies)
            hidden = None if hidden is None else hidden.repeat(1, copies, 1)
        return self._launch(Row(ids, positions, where, hidden, packing, copies))

    def _last_block(self, row: Row) -> AbstractContextManager[None]:
        """Within, the last block computes what is read of it."""
        last = len(self._loaded.decoder) - 1
        name, block = f"{self._loaded.decoder.prefix}.{last}.", self._loaded.decoder.blocks[last]
        tuned = row.copies > 1 and any(n.startswith(name) for n in self._weights)
        if tuned or self._watched:
            return nullcontext()
        return at_places(block, row.places, row.ids.shape[1])

    @torch.no_grad()
    def _launch(self, row: Row) -> torch.Tensor:
        """Logits [copies x U, V] of a packed row that holds all copies."""

        def keep_scored(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][0, row.places], *args[1:])

        model = self._loaded.model
        head = model.get_output_embeddings()  # type: ignore[operator]
        handle = head.register_forward_pre_hook(keep_scored)
        apart: AbstractContextManager[None] = nullcontext()
        if row.copies > 1:
            apart = paired(model, self._weights, row.ids.shape[1] // row.copies, self._whole)
        pair = self.fp8 if row.copies == 2 else None
        compiled = {b: f for b, f in self._compiled.items() if not (pair and pair.runs(b))}
        try:
            with (
                packed(model, row.packing, self._loaded.dtype if pair else None),
                self._frozen.skipped(row.hidden),
                standing_in(compiled),
                pair.running() if pair else nullcontext(),
                self._last_block(row),
                apart,
            ):
                return model(input_ids=row.ids, position_ids=row.positions, use_cache=False).logits
        finally:
            handle.remove()


def _mostly(tuned: Collection[str], prefix: str, block: nn.Module) -> bool:
    """Whether most weights of a block, whose names begin with the prefix, are tuned."""
    sizes = {prefix + name: p.numel() for name, p in block.named_parameters()}
    return 2 * sum(sizes.get(name, 0) for name in tuned) > sum(sizes.values())
