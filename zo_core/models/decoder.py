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


def find_decoder(model: nn.Module) -> Decoder:
    """Find the list of decoder blocks: the outermost ``nn.ModuleList`` with the most parameters.

    Raises:
        UserError: the model has no list of blocks.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    outermost = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if not outermost:
        raise UserError(
            f"model: {type(model).__name__} cannot be read: looked for one nn.ModuleList of "
            "decoder blocks and found none."
        )
    name, blocks = max(outermost, key=lambda item: sum(p.numel() for p in item[1].parameters()))
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
