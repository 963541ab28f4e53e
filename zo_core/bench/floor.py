"""The floor of a step: its products with frozen and tuned weights, and nothing else."""

from collections.abc import Iterable, Sequence
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import nn


class ProductFloor:
    """The products of some blocks and of the head, with as many random rows as batches have."""

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        head: nn.Module,
        tokens: Sequence[int],
        places: Sequence[int],
    ) -> None:
        """Find the linear layers.

        Args:
            blocks: the blocks.
            head: what gives the logits.
            tokens: rows of every product of the blocks, batch by batch.
            places: rows of the head's.
        """
        modules = (module for block in blocks for module in block.modules())
        self._weights = [m.weight for m in modules if isinstance(m, nn.Linear)]
        self._head: torch.Tensor = head.weight  # type: ignore[assignment]
        self._rows = list(zip(tokens, places, strict=True))
        self._inputs = {
            w.shape[1]: torch.randn(
                max(*tokens, *places), w.shape[1], device=w.device, dtype=w.dtype
            )
            for w in (*self._weights, self._head)
        }
        self.flops = 2.0 * fmean(tokens) * sum(w.numel() for w in self._weights)
        self.flops += 2.0 * fmean(places) * self._head.numel()
        """Floating-point operations of a batch, mean."""

    @torch.no_grad()
    def run(self) -> None:
        """Compute them all once for every batch."""
        for tokens, places in self._rows:
            for weight in self._weights:
                F.linear(self._inputs[weight.shape[1]][:tokens], weight)
            F.linear(self._inputs[self._head.shape[1]][:places], self._head)
