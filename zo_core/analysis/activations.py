"""Activation scan: streaming statistics of every block output, in one pass, storing none of them.

For each layer, over all real tokens and channels of all sequences: the three largest magnitudes
with their place, median, mean, the largest magnitude of every channel, and, for the first
sequences, the largest magnitude at every token. Statistics are taken in float32 (sums in
float64) whatever the model's dtype.

The median comes from a histogram over the leading 16 bits of the float32 pattern (8 exponent and 8
mantissa bits below the sign), whose bins are at most 2**-8 wide relative to their value: reported
as the bin's middle, it is within 0.2 % of the exact one, in constant memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from zo_core.models.decoder import hidden_of
from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import batches

EMBEDDING = -1
"""Layer number of the embedding output, the input of block 0."""
TOP = 3
TOKEN_SEQUENCES = 8
"""Sequences whose token x layer magnitudes are kept."""
_SHIFT = 15  # float32 pattern -> 16-bit bin of its magnitude
_BINS = 1 << 16


class _LayerStatistics:
    """Running statistics of one layer."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.nonfinite = 0
        self.first_nonfinite: tuple[int, int] | None = None
        """(sequence, position) of the first token with a NaN or infinite activation."""
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.histogram = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self.channel_max = torch.zeros(channels, device=device)
        self.top: list[tuple[float, int, int, int, float]] = []
        """(magnitude, sequence, position, channel, signed value), largest first."""

    def add(self, states: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor) -> None:
        """Take in ``states`` float32 [N, C] of N real tokens at the given places (int64 [N])."""
        magnitude = states.abs()
        values = magnitude.flatten()
        finite = magnitude.isfinite()
        if not bool(finite.all()):
            if not self.nonfinite:
                worst = int((~finite).any(-1).nonzero()[0])
                self.first_nonfinite = (int(sequence[worst]), int(position[worst]))
            self.nonfinite += int((~finite).sum())
            values = magnitude[finite]
            magnitude = magnitude.masked_fill(~finite, 0.0)
        self.count += values.numel()
        self.total += values.sum(dtype=torch.float64)
        self.histogram += torch.bincount(values.view(torch.int32) >> _SHIFT, minlength=_BINS)
        self.channel_max = torch.maximum(self.channel_max, magnitude.amax(0))
        values, flat = magnitude.flatten().topk(min(TOP, magnitude.numel()))
        token, channel = flat // magnitude.shape[1], flat % magnitude.shape[1]
        columns = (values, sequence[token], position[token], channel, states[token, channel])
        found = list(zip(*(c.tolist() for c in columns), strict=True))
        self.top = sorted(self.top + found, key=lambda t: (-t[0], *t[1:4]))[:TOP]

    def mean(self) -> float:
        """Mean magnitude; NaN if there is no finite value."""
        return float(self.total) / self.count if self.count else math.nan

    def median(self) -> float:
        """Median magnitude, within 0.2 %; NaN if there is no finite value."""
        if not self.count:
            return math.nan
        middle = (self.histogram.sum() + 1) // 2
        index = int((self.histogram.cumsum(0) < middle).sum())
        edges = torch.tensor([index, index + 1], dtype=torch.int32) << _SHIFT
        low, high = edges.view(torch.float32).tolist()
        return (low + high) / 2


class ActivationScan:
    """Runs sequences through a model and keeps per-layer statistics."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Prepare a scan of a loaded model."""
        self._loaded = loaded
        channels = loaded.info.hidden_size
        self._layers = {
            k: _LayerStatistics(channels, loaded.device)
            for k in range(EMBEDDING, len(loaded.decoder))
        }
        self._tokens: list[dict[str, Any]] = []
        self._sequences: list[list[int]] = []

    @torch.no_grad()
    def run(
        self,
        sequences: Sequence[list[int]],
        batch_size: int,
        tick: Callable[[int], None] = lambda _done: None,
    ) -> None:
        """Scan token sequences.

        Sequences are padded on the right, where causal attention cannot see the padding.

        Args:
            sequences: token ids.
            batch_size: sequences a forward pass.
            tick: called with the number of sequences done; may raise to stop.
        """
        device, decoder = self._loaded.device, self._loaded.decoder
        for chunk in batches(len(sequences), batch_size):
            part = [sequences[i] for i in chunk]
            width = max(map(len, part))
            ids = torch.tensor([s + [0] * (width - len(s)) for s in part], device=device)
            lengths = torch.tensor([len(s) for s in part], device=device)
            real = torch.arange(width, device=device) < lengths[:, None]
            first = len(self._sequences)
            hooks = [
                decoder.blocks[0].register_forward_pre_hook(
                    self._hook(EMBEDDING, real, first), with_kwargs=True
                )
            ]
            hooks += [
                block.register_forward_hook(self._hook(k, real, first))
                for k, block in enumerate(decoder.blocks)
            ]
            try:
                # The base model: logits are not needed.
                self._loaded.model.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
            finally:
                for hook in hooks:
                    hook.remove()
            self._sequences += part
            tick(len(self._sequences))

    def _hook(self, layer: int, real: torch.Tensor, first: int) -> Callable[..., None]:
        def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(args[0] if args else kwargs["hidden_states"])

        def on_output(_module: nn.Module, _args: Any, output: object) -> None:
            take(hidden_of(output))

        def take(hidden: torch.Tensor) -> None:
            states = hidden[real].float()
            sequence, position = real.nonzero(as_tuple=True)
            self._layers[layer].add(states, sequence + first, position)
            keep = sequence + first < TOKEN_SEQUENCES
            if layer != EMBEDDING and bool(keep.any()):
                magnitude, channel = states[keep].abs().nan_to_num(0.0, 0.0, 0.0).max(-1)
                columns = (sequence[keep] + first, position[keep], magnitude, channel)
                for s, p, m, c in zip(*(x.tolist() for x in columns), strict=True):
                    self._tokens.append(
                        {"sequence": s, "position": p, "layer": layer, "magnitude": m, "channel": c}
                    )

        return on_input if layer == EMBEDDING else on_output

    def _text(self, sequence: int, position: int) -> str:
        return str(self._loaded.tokenizer.decode([self._sequences[sequence][position]]))

    def layers(self) -> pd.DataFrame:
        """One row a layer (-1: embedding output); columns as in docs/run-store.md."""
        rows = []
        for layer, statistics in self._layers.items():
            row: dict[str, Any] = {"layer": layer}
            if not statistics.count:
                row |= {f"top{rank}": math.nan for rank in range(1, TOP + 1)}
                statistics.top = []
            for rank, (magnitude, s, p, c, value) in enumerate(statistics.top, start=1):
                row |= {
                    f"top{rank}": magnitude,
                    f"top{rank}_value": value,
                    f"top{rank}_sequence": s,
                    f"top{rank}_position": p,
                    f"top{rank}_token": self._text(s, p),
                    f"top{rank}_channel": c,
                }
            row |= {
                "median": statistics.median(),
                "mean": statistics.mean(),
                "nonfinite": statistics.nonfinite,
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def channels(self) -> pd.DataFrame:
        """``layer, channel, magnitude``: largest magnitude of every channel of every block."""
        parts = [
            pd.DataFrame({"layer": k, "magnitude": s.channel_max.cpu().numpy()})
            .rename_axis("channel")
            .reset_index()
            for k, s in self._layers.items()
            if k != EMBEDDING
        ]
        return pd.concat(parts, ignore_index=True)[["layer", "channel", "magnitude"]]

    def tokens(self) -> pd.DataFrame:
        """``sequence, position, token, layer, magnitude, channel`` of the first sequences."""
        frame = pd.DataFrame(self._tokens)
        places = zip(frame["sequence"], frame["position"], strict=True)
        frame.insert(2, "token", [self._text(s, p) for s, p in places])
        return frame.sort_values(["sequence", "position", "layer"], ignore_index=True)

    def nonfinite(self) -> list[tuple[int, int, str]]:
        """Layers with NaN or infinite activations: (layer, how many, first such token)."""
        return [
            (layer, statistics.nonfinite, self._text(*statistics.first_nonfinite))
            for layer, statistics in self._layers.items()
            if statistics.first_nonfinite is not None
        ]

    @property
    def n_tokens(self) -> int:
        """Tokens scanned."""
        return sum(map(len, self._sequences))

    @property
    def n_sequences(self) -> int:
        """Sequences scanned."""
        return len(self._sequences)
