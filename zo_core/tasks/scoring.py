"""From logits to candidate scores and losses (MeZO's)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from zo_core.tasks.templates import Example


@dataclass(frozen=True, slots=True)
class Scored:
    """Which logits score which candidate. U places, P scored tokens, B examples, C candidates."""

    row: torch.Tensor
    """int64 [U]: token row of each place whose logits are needed."""
    position: torch.Tensor
    """int64 [U]: position in the row."""
    place: torch.Tensor
    """int64 [P]: place whose logits predict the scored token."""
    token: torch.Tensor
    """int64 [P]: the scored token."""
    owner: torch.Tensor
    """int64 [P]: example x C + candidate."""
    share: torch.Tensor
    """float32 [P]: 1 / number of scored tokens of the owner."""
    label: torch.Tensor
    """int64 [B]."""
    n_candidates: int

    def to(self, device: torch.device) -> "Scored":
        """The same on another device."""
        names = [f.name for f in fields(self) if f.name != "n_candidates"]
        tensors = [getattr(self, name) for name in names]
        if device.type == "cuda":  # so that nobody waits for the copies
            tensors = [t.pin_memory() for t in tensors]
        moved = [t.to(device, non_blocking=True) for t in tensors]
        return replace(self, **dict(zip(names, moved, strict=True)))


def layout(
    examples: Sequence[Example],
    rows_of: Callable[[Example], Sequence[tuple[int, ...]]],
    place_of: Callable[[tuple[int, ...], int], int],
    device: torch.device,
) -> tuple[list[tuple[int, ...]], Scored]:
    """Lay examples out as token rows and say where every candidate is scored.

    Args:
        examples: all with the same number of candidates.
        rows_of: the token rows to run for an example; each candidate's tokens, with or without the
            last one, begin one of them.
        place_of: position in the padded row of the token at index i, given (row, i).
        device: where the index tensors go.
    """
    rows: list[tuple[int, ...]] = []
    places: dict[tuple[int, int], int] = {}
    place, token, owner, share = [], [], [], []
    n_candidates = len(examples[0].candidates)
    for number, example in enumerate(examples):
        own = list(rows_of(example))
        for index, candidate in enumerate(example.candidates):
            inputs = candidate.tokens[:-1]
            which = next(i for i, r in enumerate(own) if r[: len(inputs)] == inputs)
            for at in range(candidate.start, len(candidate.tokens)):
                spot = (len(rows) + which, place_of(own[which], at - 1))
                place.append(places.setdefault(spot, len(places)))
                token.append(candidate.tokens[at])
                owner.append(number * n_candidates + index)
                share.append(1.0 / len(candidate.scored))
        rows += own

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return rows, Scored(
        row=ints([r for r, _ in places]),
        position=ints([p for _, p in places]),
        place=ints(place),
        token=ints(token),
        owner=ints(owner),
        share=torch.tensor(share, device=device),
        label=ints([e.label for e in examples]),
        n_candidates=n_candidates,
    )


def candidate_scores(logits: torch.Tensor, scored: Scored) -> torch.Tensor:
    """Length-mean log-probability of every candidate.

    Args:
        logits: float [U, V], at the places of ``scored``.
        scored: the layout.

    Returns:
        float32 [B, C].
    """
    log_probability = logits.float().log_softmax(-1)[scored.place, scored.token] * scored.share
    flat = torch.zeros(
        len(scored.label) * scored.n_candidates, device=logits.device, dtype=torch.float32
    )
    return flat.index_add_(0, scored.owner, log_probability).view(-1, scored.n_candidates)


def example_losses(scores: torch.Tensor, label: torch.Tensor, gold: bool) -> torch.Tensor:
    """The loss of every example, in nats.

    Args:
        scores: float32 [B, C], length-mean log-probabilities.
        label: int64 [B].
        gold: True: cross entropy on the gold option's tokens, mean over its tokens (COPA, SQuAD,
            DROP); False: cross entropy over the candidates' scores (the other tasks).

    Returns:
        float32 [B].
    """
    if gold:
        return -scores.gather(1, label[:, None])[:, 0]
    return F.cross_entropy(scores, label, reduction="none")


def task_loss(logits: torch.Tensor, scored: Scored) -> torch.Tensor:
    """The training loss, mean over the batch: a float32 scalar, in nats.

    Examples of several candidates: cross entropy over their scores. Examples of one, the gold
    option (:attr:`Example.gold`): cross entropy on its tokens, mean over the tokens of an example
    first and over examples then. MeZO takes the mean over all tokens of the batch there, so that a
    long answer weighs more.
    """
    scores = candidate_scores(logits, scored)
    return example_losses(scores, scored.label, gold=scored.n_candidates == 1).mean()


def batches(count: int, size: int) -> Iterator[range]:
    """Consecutive index ranges that cover ``count`` items."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
