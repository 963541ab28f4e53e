"""Activation scan: streaming statistics of every layer, in one pass, storing no activation.

For each layer, over all real tokens of all sequences: the statistics of
:mod:`zo_core.analysis.statistics` of the block output, the attention output, the MLP output and the
down-projection input, with the largest magnitude of every channel; and, for the first sequences,
the largest magnitude of the block output at every token. Statistics are taken in float32 (sums in
float64) whatever the model's dtype. Columns and definitions: docs/scan.md.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from zo_core.analysis.observe import PARTS, Batch, BlockObserver
from zo_core.analysis.statistics import Statistics
from zo_core.analysis.weights import wanda_shares, weight_rows
from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import batches

EMBEDDING = -1
"""Layer number of the embedding output, the input of block 0."""
TOP = 3
TOKEN_SEQUENCES = 8
"""Sequences whose token x layer magnitudes are kept."""


class ActivationScan:
    """Runs sequences through a model and keeps per-layer statistics."""

    def __init__(self, loaded: LoadedModel, parts: bool = True) -> None:
        """Prepare a scan of a loaded model.

        Args:
            loaded: the model.
            parts: False: block outputs only.
        """
        self._loaded, self._parts = loaded, parts
        self.observers = {
            k: BlockObserver(block, k, loaded.device, parts)
            for k, block in enumerate(loaded.decoder.blocks)
        }
        self._embedding = BlockObserver(
            loaded.decoder.blocks[0], EMBEDDING, loaded.device, parts=False
        )
        self._sequences: list[list[int]] = []
        self._starts = [0]
        """Number of the first token of each sequence, and of all tokens."""
        self._weights: list[dict[str, Any]] = []
        self._owl: list[dict[str, float]] = []
        self._table: pd.DataFrame | None = None

    def run(
        self,
        sequences: Sequence[list[int]],
        batch_size: int,
        tick: Callable[[int], None] = lambda _done: None,
    ) -> None:
        """Scan token sequences, once.

        Sequences are padded on the right, where causal attention cannot see the padding.

        Args:
            sequences: token ids.
            batch_size: sequences a forward pass.
            tick: called with the number of sequences done; may raise to stop.
        """
        self.watch(sequences, batch_size, tick)
        self.read_weights()

    @torch.no_grad()
    def watch(
        self,
        sequences: Sequence[list[int]],
        batch_size: int,
        tick: Callable[[int], None] = lambda _done: None,
    ) -> None:
        """The forward passes of :meth:`run`."""
        self.begin(sequences)
        with self.watching(*self.observers):
            for chunk in batches(len(sequences), batch_size):
                ids = self.enter(chunk)
                # The base model: logits are not needed.
                self._loaded.model.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
                tick(chunk.stop)

    @torch.no_grad()
    def read_weights(self) -> None:
        """What :meth:`run` says of weights, of every layer."""
        for layer in self.observers:
            self.finish(layer)

    def begin(self, sequences: Sequence[list[int]]) -> None:
        """Note the sequences that will be scanned."""
        self._table = None
        self._sequences = list(sequences)
        self._starts = [0, *accumulate(map(len, sequences))]

    @contextmanager
    def watching(self, *layers: int) -> Iterator[None]:
        """Within, what these layers return is taken in; and the embedding, with layer 0."""
        watched = [self.observers[k] for k in layers]
        hook = None
        if 0 in layers:
            hook = self._loaded.decoder.blocks[0].register_forward_pre_hook(
                self._embedded, with_kwargs=True
            )
        for observer in watched:
            observer.attach()
        try:
            yield
        finally:
            for observer in watched:
                observer.detach()
            if hook is not None:
                hook.remove()

    def enter(self, chunk: range) -> torch.Tensor:
        """Token ids int64 [B, T] of some sequences, padded; hooks then know their places."""
        device = self._loaded.device
        part = [self._sequences[i] for i in chunk]
        width = max(map(len, part))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in part], device=device)
        first, end = self._starts[chunk.start], self._starts[chunk.stop]
        kept = self._starts[min(TOKEN_SEQUENCES, len(self._sequences))]
        rows = None
        if len(part) * width > end - first:
            rows = [b * width + t for b, s in enumerate(part) for t in range(len(s))]
        batch = Batch(
            size=len(part) * width,
            first=first,
            tokens=torch.arange(first, end, device=device),
            rows=None if rows is None else torch.tensor(rows, device=device),
            kept=max(0, min(kept, end) - first),
        )
        for observer in (self._embedding, *self.observers.values()):
            observer.batch = batch
        return ids

    def finish(self, layer: int) -> None:
        """Read the weights of a layer whose activations were all seen."""
        if not self._parts:
            return
        observer = self.observers[layer]
        self._weights += weight_rows(observer)
        shares = wanda_shares(observer)
        self._owl += [{"layer": layer, "m": m, "share": share} for m, share in shares.items()]

    def _embedded(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._embedding.add("block_output", args[0] if args else kwargs["hidden_states"])

    def _place(self, token: int) -> tuple[int, int, str]:
        """(sequence, position, text) of a token."""
        sequence = bisect_right(self._starts, token) - 1
        position = token - self._starts[sequence]
        return sequence, position, self._text(self._sequences[sequence][position])

    def _text(self, token: int) -> str:
        return str(self._loaded.tokenizer.decode([token]))

    def _row(self, statistics: Statistics) -> dict[str, Any]:
        numbers = statistics.row()
        row: dict[str, Any] = {}
        for rank in range(1, TOP + 1):
            row[f"top{rank}"] = numbers.pop(f"top{rank}")
        for rank, (token, channel, value) in enumerate(statistics.places(), start=1):
            sequence, position, text = self._place(token)
            row |= {
                f"top{rank}_value": value,
                f"top{rank}_sequence": sequence,
                f"top{rank}_position": position,
                f"top{rank}_token": text,
                f"top{rank}_channel": channel,
            }
        row |= numbers
        broken = statistics.broken_token()
        place = (None, None, None) if broken is None else self._place(broken)
        names = ("nonfinite_sequence", "nonfinite_position", "nonfinite_token")
        return row | dict(zip(names, place, strict=True))

    def parts(self) -> pd.DataFrame:
        """One row a layer and part; columns as in docs/scan.md."""
        if self._table is None:
            self._table = pd.DataFrame(
                {"layer": layer, "part": part} | self._row(observer.statistics[part])
                for layer, observer in [(EMBEDDING, self._embedding), *self.observers.items()]
                for part in PARTS
                if part in observer.statistics
            )
        return self._table

    def layers(self) -> pd.DataFrame:
        """One row a layer (-1: embedding output): the block output."""
        parts = self.parts()
        return parts[parts["part"] == PARTS[0]].drop(columns="part").reset_index(drop=True)

    def channels(self) -> pd.DataFrame:
        """``layer, part, channel, magnitude, tokens6`` of every part that is kept by channel."""
        kept = [
            (layer, which, observer.statistics[part])
            for layer, observer in self.observers.items()
            for which, part in enumerate(PARTS)
            if part in observer.statistics and observer.statistics[part].by_channel
        ]
        layers, parts, statistics = zip(*kept, strict=True)
        sizes = [s.channels for s in statistics]
        return pd.DataFrame(
            {
                "layer": np.repeat(layers, sizes),
                "part": pd.Categorical.from_codes(np.repeat(parts, sizes), list(PARTS)),
                "channel": np.concatenate([np.arange(size) for size in sizes]),
                "magnitude": torch.cat([s.channel_max for s in statistics]).cpu().numpy(),
                "tokens6": torch.cat([s.channel_tokens for s in statistics]).cpu().numpy(),
            }
        )

    def tokens(self) -> pd.DataFrame:
        """``sequence, position, token, layer, magnitude, channel`` of the first sequences."""
        rows = []
        for layer, observer in self.observers.items():
            for piece in observer.kept:
                for token, magnitude, channel in zip(*(x.tolist() for x in piece), strict=True):
                    sequence, position, text = self._place(token)
                    rows.append((sequence, position, text, layer, magnitude, channel))
        names = ["sequence", "position", "token", "layer", "magnitude", "channel"]
        frame = pd.DataFrame(rows, columns=names)
        return frame.sort_values(["sequence", "position", "layer"], ignore_index=True)

    def weights(self) -> pd.DataFrame:
        """One row a down-projection; columns as in docs/scan.md."""
        return pd.DataFrame(self._weights)

    def owl(self) -> pd.DataFrame:
        """``layer, m, share``: shares of Wanda scores above m x their mean."""
        return pd.DataFrame(self._owl, columns=["layer", "m", "share"])

    def nonfinite(self) -> list[tuple[int, int, str]]:
        """Layers with NaN or infinite activations: (layer, how many, first such token)."""
        table = self.layers()
        broken = table[table["nonfinite"] > 0]
        columns = (broken["layer"], broken["nonfinite"], broken["nonfinite_token"])
        return [(int(k), int(n), str(t)) for k, n, t in zip(*columns, strict=True)]

    def begins_with(self, token: int | None) -> bool:
        """Whether every sequence begins with this token."""
        return token is not None and all(s[0] == token for s in self._sequences)

    @property
    def n_tokens(self) -> int:
        """Tokens scanned."""
        return self._starts[-1]

    @property
    def n_sequences(self) -> int:
        """Sequences scanned."""
        return len(self._sequences)
