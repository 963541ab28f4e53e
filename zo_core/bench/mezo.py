"""MeZO's step as published (Malladi et al. 2023, Algorithm 1), as the arm to compare with.

Its arithmetic, written by us: per parameter and pass over z, a normal tensor in the parameter's own
dtype from a reseeded generator, out of place; the update is a fourth pass. Rows are padded on the
left to a multiple of 8, classification tasks run batch x candidates rows, and the loss is taken
from the log-probabilities of every position and word.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import Scored, candidate_sums, layout
from zo_core.tasks.templates import Example

MULTIPLE = 8
"""Width of a batch is rounded up to this."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Token rows padded on the left."""

    input_ids: torch.Tensor
    """int64 [R, W]."""
    mask: torch.Tensor
    """int64 [R, W], 1 at real tokens."""
    scored: Scored


class PublishedMezo:
    """MeZO on some parameters of a model: all of them, or one layer's (the "naive" arm)."""

    def __init__(
        self, loaded: LoadedModel, parameters: Sequence[torch.Tensor], eps: float, lr: float
    ) -> None:
        """Wrap a model.

        Args:
            loaded: the model; its weights drift as the published code's do.
            parameters: tuned weights.
            eps: perturbation scale.
            lr: learning rate.
        """
        self._loaded, self._parameters = loaded, parameters
        self._eps, self._lr = eps, lr

    def prepare(self, examples: Sequence[Example]) -> PaddedBatch:
        """Lay a batch out; an example trained on its gold option has one row."""
        longest = max(len(c.tokens) for e in examples for c in e.candidates)
        width = -(-longest // MULTIPLE) * MULTIPLE
        device = self._loaded.device
        rows, scored = layout(
            examples,
            rows_of=lambda e: [c.tokens for c in e.candidates],
            place_of=lambda row, at: width - len(row) + at,
            device=device,
        )
        ids = [[0] * (width - len(r)) + list(r) for r in rows]
        mask = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
        return PaddedBatch(
            torch.tensor(ids, device=device), torch.tensor(mask, device=device), scored
        )

    @torch.no_grad()
    def step(
        self, batch: PaddedBatch, seed: int, mark: Callable[[str], None] = lambda _phase: None
    ) -> float:
        """One step; returns the loss at ``theta + eps z``.

        Args:
            batch: from :meth:`prepare`.
            seed: of z.
            mark: called with the name of every phase as it ends, for timing.
        """
        self._perturb(seed, 1)
        mark("perturb")
        plus = self._loss(batch)
        mark("forward")
        self._perturb(seed, -2)
        mark("perturb")
        minus = self._loss(batch)
        mark("forward")
        self._perturb(seed, 1)
        mark("perturb")
        g = (plus - minus).item() / (2 * self._eps)
        torch.manual_seed(seed)
        for parameter in self._parameters:
            parameter.data = parameter.data - self._lr * (g * _normal(parameter))
        mark("update")
        return float(plus)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Afterwards every weight is what it was, and where it was: graphs may know the place."""
        kept = [parameter.data for parameter in self._parameters]
        try:
            yield
        finally:
            for parameter, data in zip(self._parameters, kept, strict=True):
                parameter.data = data

    def _perturb(self, seed: int, factor: int) -> None:
        torch.manual_seed(seed)
        for parameter in self._parameters:
            parameter.data = parameter.data + factor * _normal(parameter) * self._eps

    def _loss(self, batch: PaddedBatch) -> torch.Tensor:
        output = self._loaded.model(
            input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False
        )
        log_probabilities = torch.log_softmax(output.logits[:, :-1].float(), dim=-1)
        scored = batch.scored
        found = log_probabilities[scored.row, scored.position][scored.place, scored.token]
        scores = candidate_sums(found * scored.share, scored)
        if scored.n_candidates == 1:
            return -scores.mean()
        return torch.nn.functional.cross_entropy(scores, scored.label)


def _normal(parameter: torch.Tensor) -> torch.Tensor:
    return torch.normal(
        mean=0.0, std=1.0, size=parameter.shape, device=parameter.device, dtype=parameter.dtype
    )
