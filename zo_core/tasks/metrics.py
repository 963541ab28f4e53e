"""Metrics of answers: SQuAD-normalised exact match and token F1, and F1 of the positive class."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (SQuAD v1.1's evaluation)."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer is one of the normalised references, else 0."""
    return float(any(normalise(answer) == normalise(r) for r in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Largest F1 of the normalised answer's words against a reference's, in [0, 1].

    Two answers that normalise to nothing match each other (SQuAD v2's evaluation; v1.1 gives 0).
    """
    return max(_word_f1(normalise(answer).split(), normalise(r).split()) for r in references)


def _word_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    same = (Counter(answer) & Counter(reference)).total()
    return 2 * same / (len(answer) + len(reference))


def positive_f1(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """F1 of label 1 over all rows (MultiRC's F1a, over all answers of all questions); 0 if none."""
    both = sum(p == y == 1 for p, y in zip(predicted, labels, strict=True))
    found = sum(p == 1 for p in predicted) + sum(y == 1 for y in labels)
    return 2 * both / found if found else 0.0
