"""From a row to tokens: the prompt, its candidates, and which tokens are scored.

The answer's tokens are what the tokenised full text has beyond its common start with the tokenised
prompt, so a merge across the border is scored as part of the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from zo_core.errors import UserError
from zo_core.tasks.catalog import TaskInfo
from zo_core.tasks.prompts import Rendered, Row

NEW_TOKENS = 50
"""Longest generated answer; at most half the context."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer: the whole token sequence and where its scored tokens begin."""

    tokens: tuple[int, ...]
    start: int

    @property
    def scored(self) -> tuple[int, ...]:
        """The scored tokens."""
        return self.tokens[self.start :]


@dataclass(frozen=True, slots=True)
class Example:
    """A row, rendered and tokenised.

    As evaluated it has every candidate. As trained on the gold option it is :attr:`gold`, with the
    right candidate alone.
    """

    candidates: tuple[Candidate, ...]
    label: int
    truncated: bool
    prompt: tuple[int, ...] = ()
    """What an answer is generated from; empty where none is."""
    references: tuple[str, ...] = ()
    """Right answers that a generated one is compared with."""

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """Token rows to run so that every candidate can be scored.

        A scored token is predicted by the token before it, so the last one is never an input;
        candidates that are single tokens after one prompt share one row; and a row that begins
        another needs no tokens of its own. Longest first.
        """
        found: list[tuple[int, ...]] = []
        for row in sorted((c.tokens[:-1] for c in self.candidates), key=len, reverse=True):
            if not any(other[: len(row)] == row for other in found):
                found.append(row)
        return found

    @property
    def gold(self) -> "Example":
        """The example with its right candidate alone."""
        return replace(self, candidates=(self.candidates[self.label],), label=0)


def encode_rows(
    task: TaskInfo,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    training: bool = False,
) -> list[Example]:
    """Render and tokenise rows; with ``training``, as the task's loss needs them."""
    shown = [task.render(row) for row in rows]
    texts = [s.prompt + text for s in shown for text in ("", *s.continuations)]
    tokens = iter(_tokens(texts, tokenizer))  # one call: each costs more than its tokens
    examples = [
        _example(
            task, s, [next(tokens) for _ in range(1 + len(s.continuations))], tokenizer, context
        )
        for s in shown
    ]
    return [e.gold for e in examples] if training and task.loss == "gold" else examples


def encode(task: TaskInfo, row: Row, tokenizer: PreTrainedTokenizerBase, context: int) -> Example:
    """Render and tokenise a row.

    Args:
        task: the task, whose prompt and candidates are used.
        row: its fields.
        tokenizer: adds BOS or not, as it is set up to.
        context: longest sequence; longer prompts lose tokens on the left, after BOS.

    Raises:
        UserError: a candidate has no token of its own, two are the same tokens, or an answer does
            not fit the context.
    """
    shown = task.render(row)
    texts = [shown.prompt + text for text in ("", *shown.continuations)]
    return _example(task, shown, _tokens(texts, tokenizer), tokenizer, context)


def _example(
    task: TaskInfo,
    shown: Rendered,
    tokenised: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
) -> Example:
    """An example from the tokens of its prompt, and of its prompt with each option."""
    prefix, *whole = tokenised
    found = []
    for option, tokens in zip(shown.options, whole, strict=True):
        start = _common(prefix, tokens)
        if start == len(tokens):
            raise UserError(
                f"task: the candidate {option!r} of {task.name} adds no token to the prompt "
                f"{shown.prompt[-40:]!r}."
            )
        if start == 0:
            raise UserError(
                f"task: the prompt {shown.prompt[-40:]!r} of {task.name} has no token before "
                f"{option!r}: nothing could predict it."
            )
        found.append((tokens, start))
    _check_different(task, found, shown.options)
    openings = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    bos = int(prefix[0] in openings)
    excess = max(0, max(len(tokens) for tokens, _ in found) - context)
    if any(start - excess < max(1, bos) for _, start in found):
        raise UserError(
            f"task: an answer of {task.name} has more tokens than the model's context of {context} "
            f"has room for: {shown.options[0][:40]!r}."
        )
    prompt: list[int] = []
    if task.generates:
        room = min(NEW_TOKENS, context // 2)
        prompt = _cut(prefix, bos, max(0, len(prefix) + room - context))
    return Example(
        candidates=tuple(
            Candidate(tuple(_cut(tokens, bos, excess)), start - excess) for tokens, start in found
        ),
        label=shown.label,
        truncated=excess > 0 or (task.generates and len(prompt) < len(prefix)),
        prompt=tuple(prompt),
        references=shown.references,
    )


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common start."""
    same = (a == b for a, b in zip(one, other, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(len(one), len(other)))


def _cut(tokens: list[int], bos: int, excess: int) -> list[int]:
    """Without ``excess`` tokens on the left, after BOS."""
    return tokens[:bos] + tokens[bos + excess :]


def _check_different(
    task: TaskInfo, found: list[tuple[list[int], int]], options: tuple[str, ...]
) -> None:
    """Refuse candidate words that the tokenizer cannot tell apart (both unknown, or one case)."""
    seen: dict[tuple[int, ...], str] = {}
    for (tokens, _), option in zip(found, options, strict=True):
        other = seen.setdefault(tuple(tokens), option)
        if task.candidates and other is not option:
            raise UserError(
                f"task: the candidates {other!r} and {option!r} of {task.name} are the same tokens "
                "to this model's tokenizer."
            )


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each text, without the EOS or SEP that some tokenizers close a text with."""
    if not texts:
        return []
    # Not verbose: a text longer than the context is cut later, and counted.
    found: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    special = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return [t[:-1] if t and t[-1] in special else t for t in found]
