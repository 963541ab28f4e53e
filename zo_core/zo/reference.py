"""From examples to logits, plainly: what a path is, and the reference path, which the papers take.

It runs one row for every candidate, with left padding, the whole model, and logits at every
position. The fast path (:mod:`zo_core.zo.forward`) must equal it to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import Scored, layout
from zo_core.tasks.templates import Example
from zo_core.zo.packing import Packing
from zo_core.zo.points import move_to
from zo_core.zo.scope import Point, TunedScope


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch ready to be run any number of times."""

    input_ids: torch.Tensor
    """int64 [R, T]; R is 1 when packed."""
    mask: torch.Tensor | None
    """int64 [R, T], 1 at real tokens; None when packed."""
    scored: Scored
    positions: torch.Tensor
    """int64 [R, T]: places of the tokens in their sequences."""
    packing: Packing | None = None
    hidden: torch.Tensor | None = None
    """Input of the lowest tuned layer, [1, T, H]; None if no layer is frozen below."""


class Forward(Protocol):
    """A way to get logits."""

    name: str

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """Lay a batch out."""

    def logits(self, prepared: Prepared) -> torch.Tensor:
        """Logits [U, V] at the batch's scored places, with the weights as they are now."""

    def logits_at(
        self, prepared: Prepared, scope: TunedScope, points: Sequence[Point]
    ) -> torch.Tensor:
        """Logits [n, U, V] at n points; the working weights are left in an unspecified state."""

    def give_up(self) -> str | None:
        """Free device memory for good without changing a bit of what is computed.

        Returns:
            What was given up, in words; None if there is nothing left.
        """

    def limit(self, examples: int, rows: Sequence[Example]) -> None:
        """Hear that no forward pass over a data set will hold more examples than this."""


def one_by_one(
    forward: Forward, prepared: Prepared, scope: TunedScope, points: Sequence[Point]
) -> torch.Tensor:
    """Logits [n, U, V] at n points, one forward pass each."""
    found = torch.empty(0)
    for number, point in enumerate(points):
        move_to(scope, point)
        logits = forward.logits(prepared)
        if not number:
            found = logits.new_empty(len(points), *logits.shape)
        found[number] = logits.detach()
    return found


class ReferenceForward:
    """Plain Hugging Face forward, batch x candidates rows, left padding, full logits."""

    name = "reference"

    def __init__(self, loaded: LoadedModel) -> None:
        """Wrap a loaded model."""
        self._loaded = loaded

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """Lay a batch out: one left-padded row for every candidate."""
        width = max(len(c.tokens) for e in examples for c in e.candidates)
        rows, scored = layout(
            examples,
            rows_of=lambda e: [c.tokens for c in e.candidates],
            place_of=lambda row, at: width - len(row) + at,
            device=self._loaded.device,
        )
        pads = [width - len(r) for r in rows]
        ids = torch.tensor([[0] * p + list(r) for p, r in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * p + [1] * len(r) for p, r in zip(pads, rows, strict=True)])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        device = self._loaded.device
        return Prepared(ids.to(device), mask.to(device), scored, positions.to(device))

    def logits(self, prepared: Prepared) -> torch.Tensor:
        """Logits [U, V] at the scored places, with gradients where a weight requires them."""
        output = self._loaded.model(
            input_ids=prepared.input_ids,
            attention_mask=prepared.mask,
            position_ids=prepared.positions,
            use_cache=False,
        )
        return output.logits[prepared.scored.row, prepared.scored.position]

    def logits_at(
        self, prepared: Prepared, scope: TunedScope, points: Sequence[Point]
    ) -> torch.Tensor:
        """Logits [n, U, V] at n points, one forward pass each."""
        return one_by_one(self, prepared, scope, points)

    def give_up(self) -> str | None:
        """Nothing is held between two passes."""
        return None

    def limit(self, examples: int, rows: Sequence[Example]) -> None:
        """A pass holds what it is given."""
