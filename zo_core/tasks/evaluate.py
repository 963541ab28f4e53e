"""Evaluation of a task: rank the options or generate an answer, and the loss on the same rows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from zo_core.models.load import LoadedModel
from zo_core.tasks.catalog import TaskInfo
from zo_core.tasks.generation import generate
from zo_core.tasks.metrics import exact_match, positive_f1, token_f1
from zo_core.tasks.scoring import batches, candidate_scores, example_losses
from zo_core.tasks.templates import NEW_TOKENS, Example

if TYPE_CHECKING:
    from zo_core.zo.reference import Forward

METRICS = ("accuracy", "f1", "em", "f1a", "loss", "examples")
"""What an evaluation may find, in this order; it always has the last two."""


def evaluate(
    task: TaskInfo,
    loaded: LoadedModel,
    forward: "Forward",
    examples: Sequence[Example],
    batch_size: int = 32,
    tick: Callable[[int], None] = lambda _done: None,
) -> dict[str, float | int]:
    """Metrics and mean training loss of a model, with the weights as they are now.

    ``forward_passes`` counts batches, and every token that a batch generates.

    ``accuracy`` is that of the option with the largest length-mean log-probability, with ``f1a``
    where the task has it; a task that generates has ``f1`` and ``em`` instead.

    Args:
        task: says how its rows are evaluated.
        loaded: the model that generates.
        forward: a forward path of that model, reference or fast, that scores.
        examples: rows with all their candidates; grouped by length so that little is spent on
            padding.
        batch_size: examples a forward pass.
        tick: called with the number of examples done, at every generated token too, and may raise
            to stop.
    """
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].rows[0]), i))
    total, f1, em = 0.0, 0.0, 0.0
    predicted: list[int] = []
    labels: list[int] = []
    passes = 0

    def generated(done: int) -> None:
        nonlocal passes
        passes += 1
        tick(done)

    for chunk in batches(len(order), batch_size):
        part = [examples[order[i]] for i in chunk]
        prepared = forward.prepare(part)
        passes += 1
        scores = candidate_scores(forward.logits(prepared), prepared.scored)
        label = prepared.scored.label
        total += float(example_losses(scores, label, gold=task.loss == "gold").sum())
        if task.generates:
            prompts, room = [e.prompt for e in part], _room(part, loaded.context)
            answers = generate(loaded, prompts, room, partial(generated, chunk.start))
            f1 += sum(token_f1(a, e.references) for a, e in zip(answers, part, strict=True))
            em += sum(exact_match(a, e.references) for a, e in zip(answers, part, strict=True))
        else:
            predicted += scores.argmax(-1).tolist()
            labels += label.tolist()
        tick(chunk.stop)
    count = len(examples)
    found: dict[str, float | int] = {}
    if task.generates:
        found |= {"f1": f1 / count, "em": em / count}
    else:
        right = sum(p == y for p, y in zip(predicted, labels, strict=True))
        found["accuracy"] = right / count
    if task.positive_f1:
        found["f1a"] = positive_f1(predicted, labels)
    return found | {"loss": total / count, "examples": count, "forward_passes": passes}


def _room(part: Sequence[Example], context: int) -> int:
    return min(NEW_TOKENS, context - max(len(e.prompt) for e in part))
