"""What a row becomes before it is tokenised: the texts of its prompt, its options, its answers.

MeZO's prompts where a row's fields do not go into the template as they are. No torch here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text."""

    prompt: str
    options: tuple[str, ...]
    """The words, choices or the answer that are scored."""
    continuations: tuple[str, ...]
    """What follows the prompt for each option, separator included."""
    label: int
    """Index of the right option."""
    references: tuple[str, ...] = ()
    """Every right answer that a generated one is compared with."""


def sentence_texts(row: Row) -> dict[str, str]:
    """SST-2: the hub's sentences end in a space, which the template already has."""
    return {"sentence": str(row["sentence"]).strip()}


def boolq_texts(row: Row) -> dict[str, str]:
    """BoolQ: the question as a sentence, with a capital letter and a question mark."""
    question = str(row["question"])
    question = question if question.endswith("?") else f"{question}?"
    return {"passage": str(row["passage"]), "question": question[0].upper() + question[1:]}


def wsc_texts(row: Row) -> dict[str, str]:
    """WSC: the pronoun in lower case."""
    return {
        "text": str(row["text"]),
        "span1": str(row["span1_text"]),
        "span2": str(row["span2_text"]).lower(),
    }


CONJUNCTIONS = {"effect": "so", "cause": "because"}


def copa_texts(row: Row) -> dict[str, str]:
    """COPA: the premise without its full stop, and the conjunction that the question asks for.

    Raises:
        ValueError: the question is neither effect nor cause.
    """
    if row["question"] not in CONJUNCTIONS:
        raise ValueError(f"has question {row['question']!r}, and not effect or cause")
    premise = str(row["premise"]).rstrip()
    return {
        "premise": premise.removesuffix("."),
        "conjunction": CONJUNCTIONS[row["question"]],
    }


def copa_choices(row: Row) -> tuple[str, ...]:
    """COPA: both choices, going on from the conjunction: the first word in lower case."""
    return tuple(_lower_first(str(row[name])) for name in ("choice1", "choice2"))


def _lower_first(choice: str) -> str:
    first, space, rest = choice.partition(" ")
    return choice if first == "I" else first.lower() + space + rest


def squad_texts(row: Row) -> dict[str, str]:
    """SQuAD: the question without spaces around it."""
    return {
        "title": str(row["title"]),
        "context": str(row["context"]),
        "question": str(row["question"]).strip(),
    }


def squad_answers(row: Row) -> tuple[str, ...]:
    """SQuAD: ``answers.text``; the first one is trained on.

    Raises:
        ValueError: there is none.
    """
    return _answers(row["answers"], "answers", "text")


def drop_texts(row: Row) -> dict[str, str]:
    """DROP: the question without spaces around it."""
    return {"passage": str(row["passage"]), "question": str(row["question"]).strip()}


def drop_answers(row: Row) -> tuple[str, ...]:
    """DROP: ``answers_spans.spans``; the first one is trained on.

    Raises:
        ValueError: there is none.
    """
    return _answers(row["answers_spans"], "answers_spans", "spans")


def _answers(value: Any, field: str, key: str) -> tuple[str, ...]:
    found: Sequence[Any] | None = value.get(key) if isinstance(value, Mapping) else None
    if found is None or isinstance(found, str) or not len(found) or not str(found[0]).strip():
        raise ValueError(f"has no answer in {field}.{key}")
    return tuple(str(answer) for answer in found)
