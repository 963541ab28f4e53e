"""From logits to candidate scores and losses (MeZO's)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from zo_core.tasks.templates import Example
from zo_core.upload import upload


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
    borders: torch.Tensor
    """int64 [B x C + 1]: where each candidate's scored tokens begin, and the last one's end."""
    share: torch.Tensor
    """float32 [P]: 1 / number of scored tokens of the candidate."""
    label: torch.Tensor
    """int64 [B]."""
    n_candidates: int

    def to(self, device: torch.device) -> "Scored":
        """The same on another device."""
        names = [f.name for f in fields(self) if f.name != "n_candidates"]
        moved = upload([getattr(self, name) for name in names], device)
        return Scored(**dict(zip(names, moved, strict=True)), n_candidates=self.n_candidates)


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
    place: list[int] = []
    token: list[int] = []
    borders, share = [0], []
    n_candidates = len(examples[0].candidates)
    for example in examples:
        own = list(rows_of(example))
        for candidate in example.candidates:
            inputs = candidate.tokens[:-1]
            which = next(i for i, r in enumerate(own) if r[: len(inputs)] == inputs)
            for at in range(candidate.start, len(candidate.tokens)):
                spot = (len(rows) + which, place_of(own[which], at - 1))
                place.append(places.setdefault(spot, len(places)))
                token.append(candidate.tokens[at])
                share.append(1.0 / len(candidate.scored))
            borders.append(len(token))
        rows += own

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return rows, Scored(
        row=ints([r for r, _ in places]),
        position=ints([p for _, p in places]),
        place=ints(place),
        token=ints(token),
        borders=ints(borders),
        share=torch.tensor(share, device=device),
        label=ints([e.label for e in examples]),
        n_candidates=n_candidates,
    )


def candidate_scores(logits: torch.Tensor, scored: Scored) -> torch.Tensor:
    """Length-mean log-probability of every candidate.

    Args:
        logits: float [..., U, V], at the places of ``scored``.
        scored: the layout.

    Returns:
        float32 [..., B, C].
    """
    log_probability = logits.float().log_softmax(-1)[..., scored.place, scored.token]
    return candidate_sums(log_probability * scored.share, scored)


def candidate_sums(values: torch.Tensor, scored: Scored) -> torch.Tensor:
    """Sums over the scored tokens of every candidate, in their order: the same bits every time.

    Args:
        values: float [..., P].
        scored: the layout.

    Returns:
        float [..., B, C].
    """
    rows = values.reshape(-1, values.shape[-1])
    borders = scored.borders.expand(len(rows), -1).contiguous()
    sums = torch.segment_reduce(rows, "sum", offsets=borders, axis=1, unsafe=True)
    return sums.view(*values.shape[:-1], -1, scored.n_candidates)


def example_losses(scores: torch.Tensor, label: torch.Tensor, gold: bool) -> torch.Tensor:
    """The loss of every example, in nats.

    Args:
        scores: float32 [..., B, C], length-mean log-probabilities.
        label: int64 [B].
        gold: True: cross entropy on the gold option's tokens, mean over its tokens (COPA, SQuAD,
            DROP); False: cross entropy over the candidates' scores (the other tasks).

    Returns:
        float32 [..., B].
    """
    found = scores if gold else scores.log_softmax(-1)
    return -found.gather(-1, label.expand(scores.shape[:-1])[..., None])[..., 0]


def task_loss(logits: torch.Tensor, scored: Scored) -> torch.Tensor:
    """The training loss, mean over the batch, in nats: float32 [...] for logits [..., U, V].

    Examples of several candidates: cross entropy over their scores. Examples of one, the gold
    option (:attr:`Example.gold`): cross entropy on its tokens, mean over the tokens of an example
    first and over examples then. MeZO takes the mean over all tokens of the batch there, so that a
    long answer weighs more.
    """
    scores = candidate_scores(logits, scored)
    return example_losses(scores, scored.label, gold=scored.n_candidates == 1).mean(-1)


def batches(count: int, size: int) -> Iterator[range]:
    """Consecutive index ranges that cover ``count`` items."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
