"""Find the decoder blocks of a causal LM by structure, whatever its family calls them."""

from dataclasses import dataclass

import torch
from torch import nn

from zo_core.errors import UserError


@dataclass(frozen=True, slots=True)
class Decoder:
    """The decoder blocks of a model and where they hang."""

    prefix: str
    """Dotted name of the list, such as ``model.layers``."""
    blocks: tuple[nn.Module, ...]

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.blocks)


RIVAL = 0.5
"""A second list with this share of the largest one's parameters makes it unclear which is meant."""


def find_decoder(model: nn.Module) -> Decoder:
    """Find the list of decoder blocks: the outermost ``nn.ModuleList`` with the most parameters.

    Raises:
        UserError: the model has no such list, or two that could be meant.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    sizes = sorted(
        (
            (sum(p.numel() for p in module.parameters()), name, module)
            for name, module in lists
            if not any(name.startswith(f"{other}.") for other, _ in lists)
        ),
        key=lambda item: -item[0],
    )
    looked = (
        f"model: {type(model).__name__} cannot be read: looked for one nn.ModuleList that holds "
        "all decoder blocks"
    )
    if not sizes or not sizes[0][0]:
        children = ", ".join(name for name, _ in model.named_children()) or "nothing"
        raise UserError(f"{looked} and found none among {children}.")
    if len(sizes) > 1 and sizes[1][0] >= RIVAL * sizes[0][0]:
        raise UserError(
            f"{looked} and found two of like size: {sizes[0][1]} ({len(sizes[0][2])} modules) and "
            f"{sizes[1][1]} ({len(sizes[1][2])})."
        )
    _, name, blocks = sizes[0]
    return Decoder(name, tuple(blocks))


def hidden_of(output: object) -> torch.Tensor:
    """The hidden states [rows, tokens, channels] in what a block returned (tensor or tuple)."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
        shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(output).__name__
        raise UserError(
            f"model: a decoder block returned {shape} where hidden states [rows, tokens, channels] "
            "were expected: this family cannot be read."
        )
    return hidden
