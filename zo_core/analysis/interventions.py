"""What massive activations are for: set them at one layer and see what the loss does.

At the output of one block, at every massive token, the massive channels are set

* ``zero``: to 0;
* ``mean``: to the mean of that channel over the massive tokens of that layer's output. Sun et al.
  2024 find that the loss hardly moves: the values are constants, whatever the text;
* ``control``: left alone, and as many ordinary channels are set to 0 at the same tokens, those of
  median peak magnitude. What this does to the loss is not due to massive activations.

The loss is the mean cross entropy of the next token over the texts, in nats.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F

from zo_core.analysis.mechanism import Site, massive_tokens
from zo_core.analysis.recording import RecordedBatch, Recording

INTERVENTIONS = ("zero", "mean", "control")


@torch.no_grad()
def text_loss(
    recording: Recording,
    layer: int | None = None,
    change: Callable[[int, torch.Tensor], torch.Tensor] = lambda _batch, hidden: hidden,
) -> float:
    """Mean next-token cross entropy over the texts, in nats.

    Args:
        recording: the texts.
        layer: whose output is changed; None: nothing is.
        change: (number of the batch, output [B, T, C]) -> what takes its place.
    """
    total, count = 0.0, 0
    for number, batch in enumerate(recording.batches):
        logits = recording.logits(batch, layer, partial(change, number))
        losses = _losses(logits, batch)
        total += float(losses.sum(dtype=torch.float64))
        count += len(losses)
    return total / count


def _losses(logits: torch.Tensor, batch: RecordedBatch) -> torch.Tensor:
    """float32 [N]: of every real token that has one before it."""
    wanted = batch.real[:, 1:]
    return F.cross_entropy(
        logits[:, :-1][wanted].float(), batch.ids[:, 1:][wanted], reduction="none"
    )


@torch.no_grad()
def intervene(
    recording: Recording, sites: Sequence[Site], tick: Callable[[int], None] = lambda _layer: None
) -> tuple[float, pd.DataFrame]:
    """The loss under every intervention at every layer.

    Args:
        recording: the texts.
        sites: the massive channels.
        tick: called with the layer after each; may raise to stop.

    Returns:
        The loss without intervention, and ``layer, intervention, loss, change``.
    """
    base = text_loss(recording)
    places = [massive_tokens(recording, site) for site in sites]
    channels = [site.channel for site in sites]
    ordinary = ordinary_channels(recording, channels)
    rows = []
    for layer in range(len(recording.loaded.decoder)):
        means = [_mean_at(recording, layer, c, p) for c, p in zip(channels, places, strict=True)]
        zeros = [0.0] * len(channels)
        settings = {
            "zero": (channels, zeros),
            "mean": (channels, means),
            "control": (ordinary, zeros),
        }
        for name in INTERVENTIONS:
            loss = text_loss(recording, layer, _setter(*settings[name], places))
            rows.append((layer, name, loss, loss - base))
            tick(layer)
    return base, pd.DataFrame(rows, columns=["layer", "intervention", "loss", "change"])


def ordinary_channels(recording: Recording, massive: Sequence[int]) -> list[int]:
    """As many channels as there are massive ones, of median peak magnitude over all layers."""
    peaks: torch.Tensor | None = None
    for batch in recording.batches:
        for output in batch.outputs:
            found = output.float().abs().nan_to_num(0.0, 0.0, 0.0)
            found = found.masked_fill(~batch.real[..., None], 0.0).amax((0, 1))
            peaks = found if peaks is None else torch.maximum(peaks, found)
    assert peaks is not None
    order = [c for c in peaks.argsort(stable=True).tolist() if c not in set(massive)]
    first = max(0, (len(order) - len(massive)) // 2)
    return order[first : first + len(massive)]


def _mean_at(
    recording: Recording, layer: int, channel: int, places: Sequence[torch.Tensor]
) -> float:
    values = [
        batch.outputs[layer][..., channel][place].float()
        for batch, place in zip(recording.batches, places, strict=True)
    ]
    return float(torch.cat(values).mean())


def _setter(
    channels: Sequence[int], values: Sequence[float], places: Sequence[Sequence[torch.Tensor]]
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    def change(batch: int, hidden: torch.Tensor) -> torch.Tensor:
        for channel, value, place in zip(channels, values, places, strict=False):
            hidden[..., channel] = hidden[..., channel].masked_fill(place[batch], value)
        return hidden

    return change
