"""Packing: what a row holds once, and what each of its tokens sees."""

from itertools import permutations

import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_core.tasks.templates import Candidate, Example
from zo_core.zo.last_block import _queries_at
from zo_core.zo.packing import Packing, pack, shared_start

TOKENS = st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple)


def test_candidates_add_only_what_differs() -> None:
    """The prompt's tokens appear once, and places point back at them."""
    rows = [[(1, 2, 3, 4), (1, 2, 3, 5, 6), (1, 2)], [(9,)]]
    ids, positions, packing, places = pack(rows, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6, 9]]
    assert positions.tolist() == [[0, 1, 2, 3, 3, 4, 0]]
    assert packing.query_lengths == (4, 2, 1)
    assert [list(k) for k in packing.keys] == [[0, 1, 2, 3], [0, 1, 2, 4, 5], [6]]
    assert [ids[0, places[r, : len(row)]].tolist() for r, row in enumerate(sum(rows, []))] == [
        list(row) for row in sum(rows, [])
    ]
    twice = packing.repeated(2)
    assert [list(k) for k in twice.keys[3:]] == [[7, 8, 9, 10], [7, 8, 9, 11, 12], [13]]


def test_a_start_that_all_share_is_there_once() -> None:
    """A template, or a BOS token: others than the first group point back at it."""
    rows = [[(1, 2, 3, 4), (1, 2, 5)], [(1, 2, 6), (1, 7)], [(1, 2)]]
    assert shared_start(rows) == 2
    ids, positions, packing, places = pack(rows, torch.device("cpu"), 2)
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert positions.tolist() == [[0, 1, 2, 3, 2, 2, 1]]
    assert packing.query_lengths == (4, 1, 1, 1)
    assert [list(k) for k in packing.keys] == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 5], [0, 6]]
    assert places[-1].tolist() == [0, 1, 0, 0]


def test_a_start_of_few_tokens_is_left_where_it_is() -> None:
    """One of a hundred, which attention over shared keys would outweigh."""
    rows = [[(1, *range(2 + i, 101 + i))] for i in range(16)]
    assert shared_start(rows) == 0
    assert shared_start([[row[:30]] for (row,) in rows]) == 1


@given(st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=5), st.booleans())
def test_every_token_sees_the_row_before_it(
    rows: list[list[tuple[int, ...]]], shared: bool
) -> None:
    """Whatever rows have in common, a segment's keys spell a row up to where it ends."""
    start = shared_start(rows) if shared else 0
    ids, positions, packing, places = pack(rows, torch.device("cpu"), start)
    flat = [row for group in rows for row in group]
    for row, where in zip(flat, places.tolist(), strict=True):
        assert tuple(ids[0, where[: len(row)]].tolist()) == row
        assert positions[0, where[: len(row)]].tolist() == list(range(len(row)))
    spelt = [tuple(ids[0, list(keys)].tolist()) for keys in packing.keys]
    assert set(spelt) <= set(flat)
    assert len(ids[0]) == packing.tokens


def test_places_that_follow_each_other_are_one_segment() -> None:
    """So the keys of a long answer are gathered once, not once for each of its tokens."""
    rows = [[(1, 2, 3, 4, 5, 6), (1, 2, 3, 7, 8)], [(9, 8, 7)]]
    *_, packing, _ = pack(rows, torch.device("cpu"))
    assert packing.query_lengths == (6, 2, 3)
    found = _queries_at(packing, torch.tensor([2, 3, 4, 2, 6, 7, 10, 10]))
    assert isinstance(found, Packing)
    assert found.query_lengths == (3, 1, 2, 1, 1)
    assert [list(keys) for keys in found.keys] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2],
        [0, 1, 2, 6, 7],
        [8, 9, 10],
        [8, 9, 10],
    ]


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), min_size=1, max_size=6))
def test_rows_are_the_fewest_that_score_every_candidate(answers: list[list[int]]) -> None:
    """Each candidate's input begins a row, and no row begins another."""
    prompt = (9,)
    candidates = tuple(Candidate((*prompt, *answer), 1) for answer in answers)
    found = Example(candidates, label=0, truncated=False)
    rows, inputs = found.rows, {c.tokens[:-1] for c in found.candidates}
    assert set(rows) <= inputs
    assert all(any(row[: len(i)] == i for row in rows) for i in inputs)
    assert not any(b[: len(a)] == a for a, b in permutations(rows, 2))
