"""From a row to tokens: the prompt, its candidates, and which tokens are scored.

The answer's tokens are what the tokenised full text has beyond its common start with the tokenised
prompt, so a merge across the border is scored as part of the answer.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from zo_core.errors import UserError
from zo_core.tasks.catalog import TaskInfo


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
    """A row, rendered and tokenised."""

    candidates: tuple[Candidate, ...]
    label: int
    truncated: bool

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """Token rows to run so that every candidate can be scored.

        A scored token is predicted by the token before it, so the last one is never an input; and
        candidates that are single tokens after one prompt share one row.
        """
        return list(dict.fromkeys(c.tokens[:-1] for c in self.candidates))


def encode(
    task: TaskInfo, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, context: int
) -> Example:
    """Render and tokenise a row.

    Args:
        task: the task, whose prompt and candidates are used.
        row: its fields.
        tokenizer: adds BOS or not, as it is set up to.
        context: longest sequence; longer prompts lose tokens on the left, after BOS.

    Raises:
        UserError: a candidate has no token of its own.
    """
    prompt = task.prompt.format(**{name: str(row[name]) for name in task.fields})
    prefix = _without_ending(tokenizer(prompt)["input_ids"], tokenizer)
    candidates = []
    for word in task.candidates:
        tokens = _without_ending(tokenizer(f"{prompt} {word}")["input_ids"], tokenizer)
        start = 0
        for a, b in zip(prefix, tokens, strict=False):
            if a != b:
                break
            start += 1
        if start == len(tokens) or start == 0:
            raise UserError(
                f"task: the candidate {word!r} of {task.name} adds no token to the prompt "
                f"{prompt[-40:]!r}."
            )
        candidates.append((tokens, start))
    longest = max(len(tokens) for tokens, _ in candidates)
    excess = max(0, longest - context)
    openings = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    bos = int(prefix[0] in openings)
    return Example(
        candidates=tuple(
            Candidate(tuple(tokens[:bos] + tokens[bos + excess :]), start - excess)
            for tokens, start in candidates
        ),
        label=int(row[task.label_field]),
        truncated=excess > 0,
    )


def _without_ending(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens without the EOS or SEP that some tokenizers close a text with."""
    special = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    return tokens[:-1] if tokens and tokens[-1] in special - {None} else tokens
