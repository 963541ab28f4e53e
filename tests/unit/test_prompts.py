"""Every task's prompt and scored span, on rows written here and real ones, by every tokenizer."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.unit.task_rows import BENCHMARKS, EXPECTED, ROWS, by_the_table
from tests.unit.tokenizer_kinds import KINDS, first_id
from zo_core.errors import UserError
from zo_core.tasks.catalog import TASKS
from zo_core.tasks.files import find_split, read_rows
from zo_core.tasks.templates import encode, encode_rows

NINE = list(ROWS)
CONTEXT = 10**6


def real_rows(task: str, count: int) -> list[dict[str, Any]]:
    """Rows of the validation split, spread over it; the test is skipped where there are none."""
    file = find_split(BENCHMARKS / task, "validation")
    if file is None:
        pytest.skip(f"no rows of {task} in {BENCHMARKS}")
    rows = read_rows(file)
    return rows[:: max(1, len(rows) // count)][:count]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return KINDS[request.param]()


def test_nine_tasks_and_the_bundled_one() -> None:
    assert list(TASKS) == ["reviews", *NINE]
    assert {t: TASKS[t].metric for t in TASKS if TASKS[t].metric != "accuracy"} == {
        "squad": "f1",
        "drop": "f1",
    }
    assert [t for t in TASKS if TASKS[t].loss == "gold"] == ["copa", "squad", "drop"]


@pytest.mark.parametrize("task", NINE)
def test_prompt_by_hand(task: str) -> None:
    shown = TASKS[task].render(ROWS[task][0])
    assert (shown.prompt, list(shown.continuations)) == EXPECTED[task]
    for row in ROWS[task]:
        again = TASKS[task].render(row)
        assert (again.prompt, list(again.continuations)) == by_the_table(task, row)
        assert again.label == row.get("label", 0)


@pytest.mark.parametrize("task", NINE)
def test_prompt_of_real_rows(task: str) -> None:
    for row in real_rows(task, 200):
        shown = TASKS[task].render(row)
        assert (shown.prompt, list(shown.continuations)) == by_the_table(task, row)
        assert shown.label == row.get("label", 0)


def test_words_of_labels() -> None:
    words = {t: TASKS[t].candidates for t in NINE if TASKS[t].candidates}
    assert words == {
        "sst2": ("terrible", "great"),
        "rte": ("Yes", "No"),
        "cb": ("Yes", "No", "Maybe"),
        "boolq": ("No", "Yes"),
        "wsc": ("No", "Yes"),
        "multirc": ("No", "Yes"),
    }


def test_references_are_all_right_answers() -> None:
    assert TASKS["squad"].render(ROWS["squad"][0]).references == ("Ann", "His sister")
    assert TASKS["drop"].render(ROWS["drop"][0]).references == ("9", "nine")
    assert TASKS["copa"].render(ROWS["copa"][0]).references == ()


def check_span(task: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Scored is what the whole text has beyond the prompt; decoded, it is the answer."""
    prompt, continuations = by_the_table(task, row)
    opening = [] if first_id(tokenizer) is None else [first_id(tokenizer)]
    before = opening + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    example = encode(TASKS[task], row, tokenizer, CONTEXT)
    assert len(example.candidates) == len(continuations)
    for text, candidate in zip(continuations, example.candidates, strict=True):
        full = opening + tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        assert list(candidate.tokens) == full
        assert 0 < candidate.start <= len(before), "no token of the prompt is scored as answer"
        merged = len(before) - candidate.start
        assert merged <= 1, "at most the token across the border"
        if merged == 0:
            assert full[: len(before)] == before
            assert letters(tokenizer.decode(candidate.scored), tokenizer) == letters(
                tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]), tokenizer
            )
    if TASKS[task].generates:
        assert list(example.prompt) == before
    else:
        assert example.prompt == ()


def letters(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text without spaces and unknown tokens."""
    return "".join(text.replace(str(tokenizer.unk_token), "").split())


@pytest.mark.parametrize("task", NINE)
def test_scored_span(task: str, tokenizer: PreTrainedTokenizerBase) -> None:
    for row in ROWS[task]:
        check_span(task, row, tokenizer)


@pytest.mark.parametrize("task", NINE)
def test_scored_span_of_real_rows(task: str, tokenizer: PreTrainedTokenizerBase) -> None:
    for row in real_rows(task, 12):
        check_span(task, row, tokenizer)


@pytest.mark.parametrize("task", NINE)
def test_bytes_are_scored_to_the_letter(task: str) -> None:
    demo = KINDS["byte-level BPE"]()
    for row in ROWS[task]:
        example = encode(TASKS[task], row, demo, CONTEXT)
        prompt, continuations = by_the_table(task, row)
        for text, candidate in zip(continuations, example.candidates, strict=True):
            assert demo.decode(candidate.tokens[: candidate.start]) == prompt
            assert demo.decode(candidate.scored) == text


@pytest.mark.parametrize("task", NINE)
def test_training_runs_the_gold_option_alone_where_the_loss_needs_no_more(task: str) -> None:
    demo = KINDS["byte-level BPE"]()
    training = encode_rows(TASKS[task], ROWS[task], demo, CONTEXT, training=True)
    whole = encode_rows(TASKS[task], ROWS[task], demo, CONTEXT)
    for trained, full, row in zip(training, whole, ROWS[task], strict=True):
        if TASKS[task].loss == "candidates":
            assert trained == full
            continue
        assert len(trained.rows) == 1
        assert trained.label == 0
        assert trained.candidates[0] == full.candidates[row.get("label", 0)]


@pytest.mark.parametrize("task", ["multirc", "squad"])
def test_long_rows_leave_room_for_the_answer(task: str, tokenizer: PreTrainedTokenizerBase) -> None:
    row = ROWS[task][0]
    field = "paragraph" if task == "multirc" else "context"
    row = row | {field: row[field] * 30}
    example = encode(TASKS[task], row, tokenizer, 200)
    whole = encode(TASKS[task], row, tokenizer, CONTEXT)
    assert example.truncated
    assert not whole.truncated
    opening = 0 if first_id(tokenizer) is None else 1
    for short, full in zip(example.candidates, whole.candidates, strict=True):
        assert short.scored == full.scored
        assert len(short.tokens) <= 200
        assert short.tokens[:opening] == full.tokens[:opening]
    if task == "squad":
        assert len(example.prompt) == 150, "50 tokens are left to generate"
        assert example.prompt[:opening] == whole.prompt[:opening]
        assert example.prompt[opening:] == whole.prompt[opening - 150 :]


def test_answer_longer_than_the_context_is_a_sentence() -> None:
    demo = KINDS["byte-level BPE"]()
    row = ROWS["squad"][0] | {"answers": {"text": ["many words " * 60]}}
    with pytest.raises(UserError, match="an answer of squad has more tokens than the model's"):
        encode(TASKS["squad"], row, demo, 64)


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("squad", {"answers": {"text": []}}, "has no answer in answers.text"),
        ("squad", {"answers": {"text": [""]}}, "has no answer in answers.text"),
        ("squad", {"answers": "Ann"}, "has no answer in answers.text"),
        ("drop", {"answers_spans": {"spans": []}}, "has no answer in answers_spans.spans"),
        ("copa", {"question": "why"}, "has question 'why', and not effect or cause"),
        ("copa", {"label": 2}, "has label 2; copa knows 0 to 1"),
        ("cb", {"label": 3}, "has label 3; cb knows 0 to 2 (Yes, No, Maybe)"),
    ],
)
def test_row_that_cannot_be_rendered(task: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^has ") as caught:
        TASKS[task].render(ROWS[task][0] | change)
    assert str(caught.value) == words


def test_rows_survive_json() -> None:
    """Field names are those of the files: nothing here depends on Python types."""
    for task, rows in ROWS.items():
        for row in rows:
            assert TASKS[task].render(json.loads(json.dumps(row))) == TASKS[task].render(row)
