"""Every block output of some texts, kept: what the mechanism's analyses look at.

Unlike the scan, which keeps nothing, this holds layers x tokens x channels values in the model's
dtype; texts for which that does not fit are refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zo_core.errors import UserError
from zo_core.models.decoder import hidden_of
from zo_core.models.load import GIB, LoadedModel, free_memory
from zo_core.tasks.scoring import batches
from zo_core.zo.frozen import FrozenLayers

ROOM = 0.5
"""Share of the free memory that a recording may take."""


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """Some sequences, padded on the right, where causal attention cannot see the padding."""

    first: int
    """Number of its first sequence."""
    ids: torch.Tensor
    """int64 [B, T]."""
    real: torch.Tensor
    """bool [B, T]."""
    outputs: list[torch.Tensor]
    """[B, T, C] of every block."""


class Recording:
    """Texts run once through a model, with every block output."""

    @torch.no_grad()
    def __init__(
        self,
        loaded: LoadedModel,
        sequences: Sequence[list[int]],
        batch_size: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the sequences.

        Args:
            loaded: the model.
            sequences: token ids.
            batch_size: sequences a forward pass.
            tick: called after every pass; may raise to stop.

        Raises:
            UserError: the outputs do not fit into the memory.
        """
        self.loaded = loaded
        self.sequences = list(sequences)
        self.batches: list[RecordedBatch] = []
        self._frozen = FrozenLayers(loaded, 0, budget=0)
        self._check_room(batch_size)
        for chunk in batches(len(sequences), batch_size):
            part = [sequences[i] for i in chunk]
            width = max(map(len, part))
            ids = torch.tensor([s + [0] * (width - len(s)) for s in part], device=loaded.device)
            lengths = torch.tensor([len(s) for s in part], device=loaded.device)
            real = torch.arange(width, device=loaded.device) < lengths[:, None]
            self.batches.append(RecordedBatch(chunk.start, ids, real, self._run(ids)))
            tick()

    def _run(self, ids: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: object) -> None:
            outputs.append(hidden_of(output).clone())

        blocks = self.loaded.decoder.blocks
        handles = [block.register_forward_hook(keep) for block in blocks]
        handles.append(blocks[0].register_forward_hook(self._frozen.see))
        try:
            # The base model: logits are not needed.
            self.loaded.model.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _check_room(self, batch_size: int) -> None:
        loaded, tokens = self.loaded, 0
        for chunk in batches(len(self.sequences), batch_size):
            tokens += len(chunk) * max(len(self.sequences[i]) for i in chunk)
        need = tokens * loaded.info.hidden_size * len(loaded.decoder) * loaded.dtype.itemsize
        free = free_memory(loaded.device)
        if need > ROOM * free:
            raise UserError(
                f"sequences: the block outputs of {tokens:,} tokens take {need / GIB:.1f} GiB and "
                f"{free / GIB:.1f} are free: lower sequences or max_tokens."
            )

    @torch.no_grad()
    def logits(
        self,
        batch: RecordedBatch,
        layer: int | None = None,
        change: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden,
    ) -> torch.Tensor:
        """Logits [B, T, V] of a batch, with the output [B, T, C] of one block changed.

        Args:
            batch: of this recording.
            layer: whose output is changed; the blocks below it are not run again. None: nothing is.
            change: gets a copy of that output and gives what takes its place.
        """
        model, blocks = self.loaded.model, self.loaded.decoder.blocks
        if layer is None:
            return model(input_ids=batch.ids, use_cache=False).logits

        def replace(_module: nn.Module, _args: Any, output: object) -> object:
            hidden = change(hidden_of(output).clone())
            return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden

        self._frozen.begin_at(layer)
        handle = blocks[layer].register_forward_hook(replace)
        try:
            with self._frozen.skipped(batch.outputs[layer - 1] if layer else None):
                return model(input_ids=batch.ids, use_cache=False).logits
        finally:
            handle.remove()

    def token(self, sequence: int, position: int) -> str:
        """The text of a token."""
        return str(self.loaded.tokenizer.decode([self.sequences[sequence][position]]))
