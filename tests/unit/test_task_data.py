"""Rows of tasks: every file format, every mistake in them, the bundled reviews, real SST-2."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from zo_core.errors import UserError
from zo_core.settings import ROOT, settings
from zo_core.tasks.catalog import TASKS
from zo_core.tasks.data import SPLITS, find_task, load_task

BENCHMARKS = Path(os.environ.get("ZO_DATA_DIR") or ROOT.parent / "shared" / "data" / "benchmarks")
Rows = list[dict[str, Any]]
TRAIN: Rows = [
    {"sentence": f"No. {i}: naïve – “fine”, isn't it? 2020-01-0{i}", "label": i % 2, "idx": i}
    for i in range(1, 8)
]
TRAIN[0]["sentence"] += " \u2028 \x85 \u2029"  # line ends to Unicode, but not to JSON lines
VALIDATION: Rows = [{"sentence": "1.0", "label": 1}, {"sentence": "null", "label": 0}]


def as_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: Rows) -> bytes:
    return pd.DataFrame(rows).to_parquet(index=False)


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": as_jsonl,
    ".jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    ".parquet": as_parquet,
}


def data_dir(
    folder: Path, train: Rows = TRAIN, validation: Rows = VALIDATION, suffix: str = ".jsonl"
) -> Path:
    """A folder that holds ``sst2/{train,validation}``."""
    (folder / "sst2").mkdir(parents=True)
    for split, rows in zip(SPLITS, (train, validation), strict=True):
        (folder / "sst2" / f"{split}{suffix}").write_bytes(WRITERS[suffix](rows))
    return folder


def texts(rows: Rows) -> list[tuple[str, int]]:
    return [(row["sentence"], row["label"]) for row in rows]


def refused(folder: Path) -> str:
    """The sentence that a folder is refused with."""
    with pytest.raises(UserError) as caught:
        load_task("sst2", folder)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    data = load_task("sst2", data_dir(tmp_path, suffix=suffix), dev_examples=0)
    assert sorted(texts(data.train)) == sorted(texts(TRAIN))
    assert texts(data.validation) == texts(VALIDATION)
    assert (data.task, data.source) == (TASKS["sst2"], "local folder")
    assert all(isinstance(row["sentence"], str) for row in data.train + data.validation)


def test_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "data_dir", data_dir(tmp_path))
    assert sorted(texts(load_task("sst2", dev_examples=0).train)) == sorted(texts(TRAIN))
    assert load_task("reviews").source == "bundled", "a bundled task needs no folder"


def test_given_folder_holds_for_the_bundled_task_too(tmp_path: Path) -> None:
    data_dir(tmp_path)
    (tmp_path / "sst2").rename(tmp_path / "reviews")
    data = load_task("reviews", tmp_path, dev_examples=0)
    assert sorted(texts(data.train)) == sorted(texts(TRAIN))


def test_examples_are_limited_reproducibly(tmp_path: Path) -> None:
    folder = data_dir(tmp_path, TRAIN * 20, TRAIN)
    first, again, other = (load_task("sst2", folder, 10, 3, seed, 5) for seed in (0, 0, 1))
    assert first == again
    assert first.train != other.train
    assert texts(first.validation) == texts(other.validation)
    assert [row["idx"] for row in first.validation] == sorted(r["idx"] for r in first.validation)
    assert (len(first.train), len(first.dev), len(first.validation)) == (10, 5, 3)
    every, limited = (load_task("sst2", folder, n, dev_examples=5) for n in (None, 10**6))
    assert texts(every.train) == texts(limited.train)
    assert len(every.train) == 7 * 20 - 5


def test_split_rule_is_mezos(tmp_path: Path) -> None:
    """Permute with numpy's legacy generator, take train + dev, hold the last dev rows out."""
    rows = [{"sentence": f"row {i}", "label": i % 2} for i in range(60)]
    folder = data_dir(tmp_path, rows)
    for seed in (0, 3):
        data = load_task("sst2", folder, 20, seed=seed, dev_examples=7)
        drawn = [rows[i] for i in np.random.RandomState(seed).permutation(60)[:27]]
        assert texts(data.train) == texts(drawn[:20])
        assert texts(data.dev) == texts(drawn[20:])


def test_too_few_rows_to_hold_any_out(tmp_path: Path) -> None:
    sentence = refused(data_dir(tmp_path))
    assert sentence == (
        "dev_examples: the train split of sst2 has 7 rows and 500 of them would be held out: lower "
        "dev_examples to at most 6."
    )
    data = load_task("sst2", tmp_path, dev_examples=6)
    assert (len(data.train), len(data.dev)) == (1, 6)


@pytest.mark.parametrize(("task", "dev"), [("cb", 100), ("copa", 100), ("wsc", 100), ("rte", 500)])
def test_small_tasks_hold_fewer_rows_out(task: str, dev: int) -> None:
    assert TASKS[task].dev == dev


def test_unknown_task_lists_the_choices() -> None:
    with pytest.raises(UserError, match=r"task: 'sst3' is unknown: choose one of reviews, sst2, "):
        find_task("sst3")


def test_missing_folder_and_missing_split(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert f"data_dir: {nowhere} has no sst2/train.jsonl" in refused(nowhere)
    folder = data_dir(tmp_path / "data")
    (folder / "sst2" / "validation.jsonl").unlink()
    assert "has no sst2/validation.jsonl, .jsonl.gz or .parquet" in refused(folder)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", b'{"sentence": "a", "label": 1}\n{"sentence": "b", "la'),
        (".jsonl", b"\xff\xfe\xfa not text\n"),
        (".jsonl.gz", b"not gzip"),
        (".jsonl.gz", gzip.compress(as_jsonl(TRAIN))[:-12]),
        (".parquet", b"PAR1 no parquet PAR1"),
        (".jsonl.gz", gzip.compress(b"")[:10] + b"\x07" * 60),
    ],
    ids=["torn json", "no text", "no gzip", "short gzip", "no parquet", "spoilt gzip"],
)
def test_broken_file_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    folder = data_dir(tmp_path, suffix=suffix)
    broken = folder / "sst2" / f"train{suffix}"
    broken.write_bytes(content)
    assert f"{broken} cannot be read" in refused(folder)


def test_missing_field_is_named(tmp_path: Path) -> None:
    without = [{"text": r["sentence"], "label": r["label"]} for r in TRAIN]
    sentence = refused(data_dir(tmp_path / "a", without))
    assert "row 0 of sst2/train has no field 'sentence'; it has text, label" in sentence
    unlabelled = [{"sentence": r["sentence"]} for r in VALIDATION]
    sentence = refused(data_dir(tmp_path / "b", validation=unlabelled))
    assert "row 0 of sst2/validation has no field 'label'" in sentence


@pytest.mark.parametrize(
    "suffix",
    list(WRITERS),
)
def test_field_missing_in_one_row_is_named(tmp_path: Path, suffix: str) -> None:
    """Not scored as the text "nan"."""
    rows = [*TRAIN[:3], {"label": 1, "idx": 9}, *TRAIN[3:]]
    assert "row 3 of sst2/train has no field 'sentence'" in refused(
        data_dir(tmp_path, rows, suffix=suffix)
    )


@pytest.mark.parametrize("label", [-1, 2, 0.5, "1", "positive"])
def test_label_out_of_range_is_named(tmp_path: Path, label: object) -> None:
    rows = [*TRAIN[:2], {"sentence": "fine", "label": label}]
    sentence = refused(data_dir(tmp_path, rows))
    assert f"row 2 of sst2/train has label {label!r}" in sentence
    assert "0 to 1 (terrible, great)" in sentence


@pytest.mark.parametrize("suffix", WRITERS)
def test_empty_split(tmp_path: Path, suffix: str) -> None:
    sentence = refused(data_dir(tmp_path, validation=[], suffix=suffix))
    assert "the validation split of sst2 has no rows" in sentence


def test_offline_hub_task_offers_the_local_folder(tmp_path: Path) -> None:
    """In a process of its own: the hub's libraries read their settings when imported."""
    code = """
        from zo_core.errors import UserError
        from zo_core.tasks.data import load_task
        try:
            load_task("sst2")
        except UserError as error:
            print(error)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("ZO_DATA_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", re.sub(r"^ {8}", "", code, flags=re.MULTILINE)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    sentence = done.stdout.strip()
    assert "the hub is out of reach" in sentence, done
    assert "--data-dir (or ZO_DATA_DIR)" in sentence
    assert "sst2/train.jsonl and sst2/validation.jsonl" in sentence
    assert "bundled task reviews" in sentence


def test_bundled_reviews_are_many_balanced_and_varied() -> None:
    split = load_task("reviews", train_examples=1000)
    assert (len(split.train), len(split.dev), len(split.validation)) == (340, 100, 200)
    data = load_task("reviews", dev_examples=0)
    data.train.sort(key=lambda row: row["idx"])
    assert len(data.train) >= 400
    for rows in (data.train, data.validation):
        counts = Counter(row["label"] for row in rows)
        assert counts[0] == counts[1] == len(rows) / 2
        assert [row["idx"] for row in rows] == list(range(len(rows)))
    every = [row["sentence"] for row in data.train + data.validation]
    words = [re.findall(r"[\w']+", sentence.lower()) for sentence in every]
    assert max(Counter(map(tuple, words)).values()) == 1, "no duplicate, also across the splits"
    starts = Counter(tuple(w[:4]) for w in words)
    assert starts.most_common(1)[0][1] == 1, starts.most_common(3)
    for sentence in every:
        assert sentence == sentence.strip()
        assert "\n" not in sentence
        assert 3 <= len(sentence.split()) <= 40


def test_bundled_labels_cannot_be_read_off_a_word() -> None:
    """No single word gives more than a part of the reviews away."""
    rows = load_task("reviews", dev_examples=0).train
    seen: Counter[tuple[str, int]] = Counter()
    for row in rows:
        seen.update((w, row["label"]) for w in set(re.findall(r"[\w']+", row["sentence"].lower())))
    word, lean = max(((w, abs(seen[w, 0] - seen[w, 1])) for w, _ in seen), key=lambda item: item[1])
    assert lean <= len(rows) / 4, word
    answers = {candidate for row in rows for candidate in TASKS["reviews"].candidates}
    named = sum(any(a in row["sentence"].lower().split() for a in answers) for row in rows)
    assert named <= len(rows) / 20


@pytest.mark.skipif(not (BENCHMARKS / "sst2").is_dir(), reason=f"no sst2 folder in {BENCHMARKS}")
def test_real_sst2_rows() -> None:
    data = load_task("sst2", BENCHMARKS, train_examples=100)
    assert len(data.train) == 100
    assert len(data.validation) == 872
    assert {row["label"] for row in data.train} == {0, 1}
    every = load_task("sst2", BENCHMARKS, 1000, 1000)
    assert (len(every.train), len(every.dev)) == (1000, 500)
    assert all(row["sentence"].strip() for row in every.train + every.validation)
