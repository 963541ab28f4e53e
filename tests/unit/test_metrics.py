"""F1 and exact match against answers worked out by hand."""

import pytest

from zo_core.tasks.metrics import exact_match, normalise, positive_f1, token_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        ("an apple, A pear & the fig!", "apple pear fig"),
        ("U.S.A.", "usa"),
        ("theory of a-the", "theory of athe"),
        ("1,000.5", "10005"),
        ("Ünïcode – dash", "ünïcode – dash"),
        (" \n the ", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("answer", "references", "f1", "em"),
    [
        ("the Denver Broncos", ["Denver Broncos"], 1.0, 1.0),
        ("Broncos", ["Denver Broncos"], 2 / 3, 0.0),
        ("Denver", ["Carolina Panthers", "Denver Broncos", "Denver"], 1.0, 1.0),
        ("in Santa Clara California", ["Santa Clara", "Levi's Stadium"], 2 * 2 / 6, 0.0),
        ("no no no", ["no"], 0.5, 0.0),
        ("no", ["no no no"], 0.5, 0.0),
        ("", ["Denver"], 0.0, 0.0),
        ("The", ["a"], 1.0, 1.0),
        ("10", ["ten", "10."], 1.0, 1.0),
        ("blue", ["red"], 0.0, 0.0),
    ],
)
def test_f1_and_exact_match(answer: str, references: list[str], f1: float, em: float) -> None:
    assert token_f1(answer, references) == pytest.approx(f1)
    assert exact_match(answer, references) == em


def test_positive_f1() -> None:
    assert positive_f1([1, 1, 0, 0], [1, 0, 1, 0]) == 0.5
    assert positive_f1([1, 1, 1], [1, 1, 0]) == pytest.approx(0.8)
    assert positive_f1([0, 0], [0, 0]) == 0.0
    assert positive_f1([2, 1], [2, 1]) == 1.0, "only label 1 counts"
