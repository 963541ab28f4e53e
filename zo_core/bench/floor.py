"""The floor of a step: the matrix products of the blocks that run, and nothing else."""

from collections.abc import Iterable, Sequence
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import nn


class ProductFloor:
    """The products of some blocks with random token rows, as many as each batch has."""

    def __init__(self, blocks: Iterable[nn.Module], tokens: Sequence[int]) -> None:
        """Find the linear layers.

        Args:
            blocks: the blocks.
            tokens: rows of every product, batch by batch.
        """
        modules = (module for block in blocks for module in block.modules())
        self._weights = [m.weight for m in modules if isinstance(m, nn.Linear)]
        self._tokens = tokens
        self._inputs = {
            w.shape[1]: torch.randn(max(tokens), w.shape[1], device=w.device, dtype=w.dtype)
            for w in self._weights
        }
        self.flops = sum(2.0 * fmean(tokens) * w.numel() for w in self._weights)
        """Floating-point operations of a batch, mean."""

    @torch.no_grad()
    def run(self) -> None:
        """Compute them all once for every batch."""
        for tokens in self._tokens:
            for weight in self._weights:
                F.linear(self._inputs[weight.shape[1]][:tokens], weight)
