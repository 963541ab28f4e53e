"""A scan of a model that is never in memory as a whole: all sequences through one block at a time.

The hidden states of all sequences are kept between blocks, in memory up to :data:`BUDGET` and in
temporary files beyond it. Blocks, batches and hooks are those of an ordinary scan, so on a CPU the
tables are the same bits.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from zo_core.analysis.activations import ActivationScan
from zo_core.models.blockwise import BlockwiseModel
from zo_core.tasks.scoring import batches

BUDGET = {"cpu": 1 << 30, "cuda": 4 << 30}
"""Bytes of hidden states kept in the device's memory."""


class HiddenStates:
    """Hidden states of every batch between two blocks."""

    def __init__(self, folder: Path, budget: int) -> None:
        """Keep up to ``budget`` bytes in memory, the rest in files in ``folder``."""
        self._folder, self._room = folder, budget
        self._kept: dict[int, torch.Tensor] = {}

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Keep the states of a batch, in place of what was kept of it."""
        if batch not in self._kept and hidden.nbytes > self._room:
            torch.save(hidden, self._folder / str(batch))
            return
        if batch not in self._kept:
            self._room -= hidden.nbytes
        self._kept[batch] = hidden

    def get(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """The states of a batch; None before the first :meth:`put`."""
        if batch in self._kept:
            return self._kept[batch]
        file = self._folder / str(batch)
        return torch.load(file, weights_only=True, map_location=device) if file.exists() else None


@torch.no_grad()
def scan_blockwise(
    scan: ActivationScan,
    model: BlockwiseModel,
    sequences: Sequence[list[int]],
    batch_size: int,
    tick: Callable[[int, int], None] = lambda _layer, _done: None,
) -> None:
    """Scan token sequences, once.

    Args:
        scan: of ``model.loaded``.
        model: the model and its files.
        sequences: token ids.
        batch_size: sequences a forward pass.
        tick: called with the layer and the number of sequences done in it; may raise to stop.

    Raises:
        ModelError: a file cannot be read.
        UserError: the model is not causal.
    """
    device = model.loaded.device
    scan.begin(sequences)
    with tempfile.TemporaryDirectory(prefix="zoscope-scan-") as folder:
        states = HiddenStates(Path(folder), BUDGET[device.type])
        for layer in range(len(model)):
            with model.block(layer):
                if not layer:
                    model.check_causal()
                with scan.watching(layer):
                    for number, chunk in enumerate(batches(len(sequences), batch_size)):
                        ids = scan.enter(chunk)
                        hidden = states.get(number, device) if layer else None
                        states.put(number, model.run(layer, ids, hidden))
                        tick(layer, chunk.stop)
                scan.finish(layer)
