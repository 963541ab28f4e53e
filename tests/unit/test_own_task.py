"""A user's own task: from a file and a template to rows, and one sentence for every mistake."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pages.parts.own_task import keep_upload
from pages.parts.preview import example_html
from tests.unit.test_rooms import run_python
from tests.unit.tokenizer_kinds import KINDS
from zo_core import runs
from zo_core.errors import UserError
from zo_core.jobs import PreviewJob, TuneJob, command_line, explain
from zo_core.progress import JobContext
from zo_core.recipes.preview import run_preview
from zo_core.runs import Process
from zo_core.settings import settings
from zo_core.tasks.data import TaskData, load_job_task
from zo_core.tasks.templates import encode

CSV = "text,mood\n" + "".join(
    f'"line {i}, quoted ""q""",{"up" if i % 2 else "down"}\n' for i in range(40)
)
FIELDS: dict[str, Any] = {
    "task": "own",
    "template": "{text} I feel",
    "verbalizers": "up=good,down=bad",
    "label_field": "mood",
}


def job(path: Path, **changes: Any) -> TuneJob:
    return TuneJob(**FIELDS | {"task_file": path} | changes)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "moods.csv"
    path.write_text(CSV)
    return path


def load(own: TuneJob, seed: int = 0) -> TaskData:
    return load_job_task(own, own.train_examples, own.eval_examples, seed, own.dev_examples)


def refused(own: TuneJob) -> str:
    with pytest.raises(UserError) as caught:
        load(own)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def test_single_file_is_split(csv: Path) -> None:
    data, other = load(job(csv)), load(job(csv), seed=1)
    assert (len(data.train), len(data.dev), len(data.validation)) == (28, 4, 8)
    assert data.validation == other.validation, "results of all seeds are on the same rows"
    assert data.train != other.train
    assert data.source == "own file"
    every = [row["text"] for row in data.train + data.dev + data.validation]
    assert sorted(every) == sorted(f'line {i}, quoted "q"' for i in range(40))
    assert len(load(job(csv, dev_examples=0)).train) == 32


def test_folder_keeps_its_splits(tmp_path: Path) -> None:
    rows = [{"text": f"line {i}", "mood": "up" if i % 2 else "down"} for i in range(30)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "validation.parquet").write_bytes(pd.DataFrame(rows[:6]).to_parquet())
    data = load(job(tmp_path))
    assert (len(data.train), len(data.dev), len(data.validation)) == (27, 3, 6)
    (tmp_path / "validation.parquet").unlink()
    assert "has no validation.csv, .jsonl, .jsonl.gz or .parquet" in refused(job(tmp_path))


def test_rendered_and_scored(csv: Path) -> None:
    data = load(job(csv))
    demo = KINDS["byte-level BPE"]()
    for row in data.train:
        example = encode(data.task, row, demo, 512)
        assert example.label == ("up", "down").index(row["mood"])
        for word, candidate in zip(("good", "bad"), example.candidates, strict=True):
            assert demo.decode(candidate.tokens) == f"{row['text']} I feel {word}"
            assert demo.decode(candidate.scored) == f" {word}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{text}\nGood or bad?\n", "t\nGood or bad?\ngood"),
        (r"{text}\nGood or bad?\n", "t\nGood or bad?\ngood"),
        ("{text} It is ", "t It is good"),
        ("{{x}} {text}:", "{x} t: good"),
    ],
    ids=["line break", "typed in a shell", "space", "braces"],
)
def test_what_stands_before_the_answer(csv: Path, template: str, text: str) -> None:
    shown = load(job(csv, template=template)).task.render({"text": "t", "mood": "up"})
    assert shown.prompt + shown.continuations[0] == text


@pytest.mark.parametrize(
    ("values", "verbalizers"),
    [
        ([0, 1], "0=bad,1=good"),
        ([0.0, 1.0], "0=bad,1=good"),
        ([False, True], "false=bad,true=good"),
        (["no way", " yes "], "no way=bad,yes=good"),
    ],
)
def test_label_values(tmp_path: Path, values: list[Any], verbalizers: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "t", "mood": values[i % 2]}) for i in range(20)))
    data = load(job(path, verbalizers=verbalizers))
    labels = [data.task.render({"text": "t", "mood": v}).label for v in values]
    assert labels == [0, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"template": "{x} I feel"},
            "template: {x} is not a field of the rows: use one of text, m",
        ),
        ({"label_field": "y"}, "label_field: 'y' is not a field of the rows: use one of text, m"),
        ({"verbalizers": "up=good,flat=so"}, "which no verbalizer names."),
        ({"dev_examples": 32}, "lower dev_examples to at most 31."),
    ],
)
def test_task_that_does_not_fit_its_rows(csv: Path, change: dict[str, Any], words: str) -> None:
    assert words in refused(job(csv, **change))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.txt", CSV, "rows.txt is of an unknown kind: give one of .csv, .jsonl"),
        ("rows.csv", "text,mood\n", "rows.csv has 0 rows: give at least 10"),
        ("rows.csv", CSV + "a,up,b\n", "line 42 has more cells than the header names"),
        ("rows.csv", CSV + '"a,up\n', "cannot be read"),
        ("rows.csv", CSV + "short\n", "has no field 'mood'"),
        ("rows.jsonl", "[1]\n" * 20, "must be a JSON object"),
        ("rows.jsonl", '{"text": ', "cannot be read"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    assert words in refused(job(tmp_path / name))


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist: give a file or a folder" in refused(job(tmp_path / "nowhere.csv"))


def sentence_for(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        TuneJob(**FIELDS | {"task_file": "rows.csv"} | changes)
    return explain(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"template": None}, "template is missing: task=own needs task_file, template and"),
        ({"task_file": None}, "task_file is missing"),
        ({"verbalizers": None}, "verbalizers is missing"),
        ({"task": "sst2"}, "task_file is for task=own only"),
        ({"template": "no field"}, "template names no field: write one in braces"),
        ({"template": "{text"}, "template has a single brace: write {{ or }}"),
        ({"template": "{}"}, "template has braces that hold more or less than a field's name"),
        ({"template": "{text!r}"}, "template has braces that hold more or less than"),
        ({"template": "{text.__class__}"}, "template can use plain fields only"),
        ({"verbalizers": "up"}, "verbalizers has 'up': write label=word, as 0=terrible,1=great"),
        ({"verbalizers": "up=good"}, "verbalizers need a word for each of at least two labels"),
        ({"verbalizers": "up=good,up=bad"}, "verbalizers name the label 'up' twice"),
        ({"verbalizers": "up=good,down=good"}, "verbalizers give the same word to two labels"),
        ({"label_field": ""}, "label_field is '': string should have at least 1 character"),
    ],
)
def test_bad_spec_is_one_sentence(change: dict[str, Any], words: str) -> None:
    sentence = sentence_for(**change)
    assert sentence.startswith(words)
    assert sentence.endswith(".")


def test_words_that_the_tokenizer_cannot_tell_apart(csv: Path) -> None:
    small = Tokenizer(models.WordLevel({"I": 0, "feel": 1, "[UNK]": 2}, unk_token="[UNK]"))
    small.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small, unk_token="[UNK]")
    data = load(job(csv))
    with pytest.raises(UserError, match="'good' and 'bad' of own are the same tokens"):
        encode(data.task, data.train[0], tokenizer, 512)


def test_command_line_has_the_whole_task(csv: Path) -> None:
    line = command_line(job(csv))
    assert "--task own" in line
    assert f"--task-file {csv}" in line
    assert "--template '{text} I feel' --verbalizers up=good,down=bad --label-field mood" in line


def test_preview_marks_the_scored_tokens(
    csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    spec = PreviewJob(**FIELDS, task_file=csv)
    run = runs.create(spec, Process.current())
    run_preview(spec, run, JobContext(run))
    summary = run.result_json() or {}
    assert summary["rows"] == {"train": 28, "dev": 4, "validation": 8}
    assert len(summary["examples"]) == 5
    first = summary["examples"][0]
    assert first["candidates"][0]["prompt"].endswith(" I feel")
    assert [c["scored"] for c in first["candidates"]] == [[" good"], [" bad"]]
    shown = example_html(first)
    assert "<mark> good</mark>" in shown
    assert shown.index("✓") < shown.index("·") or first["label"] == 1


def test_preview_shows_markup_as_text() -> None:
    candidate = {"prompt": "<script>x</script>", "scored": ["<b>", "\n"], "tokens": 3}
    shown = example_html({"label": 0, "truncated": True, "candidates": [candidate]})
    assert "<script>" not in shown
    assert "<mark>&lt;b&gt;</mark><mark>⏎</mark>" in shown
    assert "cut on the left" in shown


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("moods.csv", r"moods-[0-9a-f]{12}\.csv"),
        ("../../etc/passwd.jsonl.gz", r"passwd-[0-9a-f]{12}\.jsonl\.gz"),
        ("..\\é è.JSONL", r"rows-[0-9a-f]{12}\.jsonl"),
        ("x" * 300 + ".parquet", r"x{40}-[0-9a-f]{12}\.parquet"),
        (".csv", r"rows-[0-9a-f]{12}\.csv"),
        ("strange.gz", r"strange-[0-9a-f]{12}\.jsonl\.gz"),
    ],
)
def test_upload_is_kept_under_a_safe_name(
    name: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    path = keep_upload(name, CSV.encode())
    assert path.parent == tmp_path / "uploads"
    assert re.fullmatch(kept, path.name), path.name
    assert path.read_text() == CSV
    assert keep_upload(name, CSV.encode()) == path
    assert len(list(path.parent.iterdir())) == 1


def test_page_offers_the_own_task(csv: Path, tmp_path: Path) -> None:
    """In a process of its own, without an engine: the form, its command, and a mistake."""
    code = f"""
        import sys
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60).run()
        for page, prefix in (("fine_tune", "tune"), ("sensitivity", "probe")):
            app.switch_page(f"pages/{{page}}.py").run()
            app.selectbox(key=f"{{prefix}}_task").select("own").run()
            app.text_input(key=f"{{prefix}}_task_file").input({str(csv)!r})
            app.text_area(key=f"{{prefix}}_template").input("{{text}} I feel")
            app.text_input(key=f"{{prefix}}_verbalizers").input("up=good,down=bad").run()
            print([c.value for c in app.code if "zo_core" in c.value][-1])
            app.text_area(key=f"{{prefix}}_template").input("no field").run()
            app.button(key=f"{{prefix}}_preview_start").click().run()
            print(any("names no field" in e.value for e in app.error), [*app.exception])
    """
    lines = run_python(code, tmp_path / "cache").strip().splitlines()
    for line, kind in ((lines[0], "tune"), (lines[2], "probe")):
        assert f"zo_core {kind} --model demo --task own --task-file {csv}" in line
        assert "--template '{text} I feel' --verbalizers up=good,down=bad" in line
    assert lines[1] == lines[3] == "True []"
