"""The fast path from examples to logits: only the work that the result depends on.

Equal to the reference path (:mod:`zo_core.zo.reference`) to rounding, through the model's own
modules. Layers below the lowest tuned one are frozen, so their output is computed once per example
and cached; token rows are packed without padding, and what they begin with alike, candidates their
prompt and examples their template, is computed once; the points ``theta + eps z`` and ``theta - eps
z`` differ in the tuned layer only and run above it as one batch; logits, and the last block above
its keys, are computed at the scored places only.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zo_core.models.load import LoadedModel
from zo_core.models.memory import PAIRED_SHARE
from zo_core.tasks.scoring import layout
from zo_core.tasks.templates import Example
from zo_core.zo.attention import packed
from zo_core.zo.fp8 import PairsInFp8, standing_in
from zo_core.zo.frozen import CHUNK, FrozenLayers
from zo_core.zo.graphs import GraphedForward, Row
from zo_core.zo.last_block import at_places
from zo_core.zo.packing import pack, shared_start
from zo_core.zo.paired import NotTokenwiseError, NotWholeError, paired
from zo_core.zo.points import Owed, write_points
from zo_core.zo.reference import Prepared, one_by_one
from zo_core.zo.scope import Point, TunedScope


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
            compiled: run the frozen blocks above the tuned layer and the norm after them through
                ``torch.compile``, and blocks that are tuned for the most part where points run side
                by side.
            tuned: names of the tuned parameters; other blocks that hold one are not compiled.
            fp8: run pairs of points through the frozen blocks above the tuned layer in fp8.
        """
        self._loaded = loaded
        prefix = loaded.decoder.prefix
        blocks = loaded.decoder.blocks
        of_block = {i: f"{prefix}.{i}." for i in range(len(blocks))}
        held = {i for i, own in of_block.items() if any(n.startswith(own) for n in tuned)}
        above = [b for i, b in enumerate(blocks) if compiled and i > layer and i not in held]
        self._compiled = {
            module: torch.compile(module.forward, dynamic=True)
            for module in (*above, *(_frozen_norms(loaded, tuned) if above else ()))
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
        self._tuned = frozenset(tuned)
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
        rows = [e.rows for e in examples]
        start = shared_start(rows)
        ids, positions, packing, places = pack(rows, device, start)
        _, scored = layout(
            examples,
            rows_of=lambda e: e.rows,
            place_of=lambda _row, at: at,
            device=torch.device("cpu"),
        )
        scored = replace(
            scored, row=torch.zeros_like(scored.row), position=places[scored.row, scored.position]
        ).to(device)
        hidden = self._frozen.output(examples, ids, positions, packing, start)
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
        return self._few(sum(p.numel() for p in scope.parameters.values()))

    def _few(self, held: int) -> bool:
        return self._tokenwise and held <= PAIRED_SHARE * self._loaded.info.parameters

    @torch.no_grad()
    def logits_at(
        self,
        prepared: Prepared,
        scope: TunedScope,
        points: Sequence[Point],
        owed: Owed | None = None,
    ) -> torch.Tensor:
        """Logits [n, U, V] at n points, with one suffix for all where that is possible.

        Args:
            prepared: the batch.
            scope: the scope.
            points: n of them.
            owed: see :func:`~zo_core.zo.points.write_points`; only where :meth:`pairs` is true.
        """
        if len(points) < 2 or not self.pairs(scope):
            return one_by_one(self, prepared, scope, points)
        self._place_weights(scope, points, owed)
        found = self._side_by_side(prepared, len(points))
        return one_by_one(self, prepared, scope, points) if found is None else found

    def _side_by_side(self, prepared: Prepared, copies: int) -> torch.Tensor | None:
        """Logits with the weights of each point; None if tokens do not go through one by one."""
        try:
            return self._run(prepared, copies).unflatten(0, (copies, -1))
        except NotWholeError:
            if self._whole:
                self._whole = {}
                return self._side_by_side(prepared, copies)
        except NotTokenwiseError:
            pass
        self._tokenwise = False
        return None

    @torch.no_grad()
    def beside(self, prepared: Prepared) -> list[torch.Tensor]:
        """Logits of the weights as they are, as the first and as the second of a pair.

        The other point of the pair is far away, so whatever of it gets mixed in shows. Without
        graphs and fp8; empty where points do not run side by side.
        """
        own = {n: p for n, p in self._loaded.model.named_parameters() if n in self._tuned}
        if not own or not self._few(sum(p.numel() for p in own.values())):
            return []
        other = {n: 0.5 * p + 0.01 for n, p in own.items()}
        graphs, (eight, self.fp8) = self.use_graphs(False), (self.fp8, None)
        found = []
        try:
            for place in (0, 1):
                self._weights = {
                    n: [p, other[n]] if place == 0 else [other[n], p] for n, p in own.items()
                }
                pair = self._side_by_side(prepared, 2)
                if pair is None:
                    return []
                found.append(pair[place])
        finally:
            self._weights = {}
            self.fp8 = eight
            self.use_graphs(graphs)
        return found

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


def _frozen_norms(loaded: LoadedModel, tuned: Collection[str]) -> list[nn.Module]:
    """The norms beside the list of blocks of which nothing is tuned; the final one is there."""
    parent, _, _ = loaded.decoder.prefix.rpartition(".")
    beside = loaded.model.get_submodule(parent).named_children()
    name = f"{parent}." if parent else ""
    return [
        module
        for own, module in beside
        if "Norm" in type(module).__name__ and not any(n.startswith(f"{name}{own}.") for n in tuned)
    ]


def _mostly(tuned: Collection[str], prefix: str, block: nn.Module) -> bool:
    """Whether most weights of a block, whose names begin with the prefix, are tuned."""
    sizes = {prefix + name: p.numel() for name, p in block.named_parameters()}
    return 2 * sum(sizes.get(name, 0) for name in tuned) > sum(sizes.values())
