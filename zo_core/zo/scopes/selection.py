"""What a scope amounts to on a loaded model."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from zo_core.models.load import LoadedModel
from zo_core.zo.scope import check_layer, tunable


def _nothing() -> None:
    """Most scopes leave the model's modules alone."""


@dataclass(slots=True)
class Selection:
    """The tuned tensors of a scope. Call :meth:`close` once they are no longer tuned."""

    parameters: dict[str, torch.Tensor]
    """Name -> working weight."""
    lowest: int | None
    """Lowest tuned layer; None if something outside the decoder blocks is tuned."""
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> bool tensor of the parameter's shape; parameters without one are tuned whole."""
    layer: int | None = None
    """The layer, for scopes inside one layer."""
    positions: int = 0
    """Positions of the context window that the scope itself takes."""
    undo: Callable[[], None] = _nothing

    def __post_init__(self) -> None:
        """Refuse quantised weights.

        Raises:
            UserError: there are some.
        """
        tunable(self.parameters)

    def close(self) -> None:
        """Give the model's modules back as they were."""
        self.undo()


def block_prefix(loaded: LoadedModel, layer: int) -> str:
    """What the names of a layer's parameters begin with, such as ``model.layers.3.``.

    Raises:
        UserError: there is no such layer.
    """
    return f"{loaded.decoder.prefix}.{check_layer(layer, len(loaded.decoder), loaded.name)}."


def parameters_of(loaded: LoadedModel, *prefixes: str) -> dict[str, torch.Tensor]:
    """The parameters whose names begin with one of the prefixes; tied ones once."""
    return {n: p for n, p in loaded.model.named_parameters() if n.startswith(prefixes)}
