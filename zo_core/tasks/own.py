"""A user's own task: rows from a file, a template and a word for each label."""

from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from zo_core.errors import UserError
from zo_core.jobs import TaskChoice
from zo_core.tasks.catalog import OWN, OWN_SUFFIXES, TaskInfo
from zo_core.tasks.files import find_split, read_rows
from zo_core.tasks.splits import SPLITS, permutation

TEST_SHARE = 0.2
"""Share of a single file's rows that is kept for the evaluation, the same whatever the seed."""
DEV_SHARE, MOST_DEV = 0.1, 500
"""Share of all rows (of the training rows, in a folder) that is held out for dev, and its limit."""
FEWEST = 10
"""Rows of a single file that can be split."""


def own_task(job: TaskChoice) -> TaskInfo:
    """The task that a job describes; its rows are not looked at.

    A template that ends in a line break is followed by the word at once, any other by a space.
    Backslash and n, as typed in a shell, mean a line break.
    """
    assert job.template is not None, job
    assert job.verbalizers is not None, job
    prompt = job.template.replace("\\n", "\n").rstrip(" ")
    names = dict.fromkeys(name for _, name, _, _ in Formatter().parse(prompt) if name)
    return TaskInfo(
        name=OWN,
        title="Own task",
        description="Your rows, template and verbalizers.",
        prompt=prompt,
        fields=tuple(names),
        candidates=tuple(job.verbalizers.values()),
        answer="{}" if prompt.endswith("\n") else " {}",
        label_field=job.label_field,
        labels=tuple(job.verbalizers),
    )


def own_rows(job: TaskChoice) -> dict[str, list[dict[str, Any]]]:
    """Rows of the splits ``train`` and ``validation``, from a folder or one file.

    A single file is split: a fifth of its rows (drawn with a fixed seed) is the validation split.

    Raises:
        UserError: the file is missing, unreadable, of another kind, or has too few rows.
    """
    path = Path(job.task_file or "").expanduser()
    if path.is_dir():
        return {name: read_rows(_in_folder(path, name), "task_file") for name in SPLITS}
    if not path.is_file():
        raise UserError(f"task_file: {path} does not exist: give a file or a folder.")
    if not path.name.endswith(OWN_SUFFIXES):
        raise UserError(
            f"task_file: {path.name} is of an unknown kind: give one of {', '.join(OWN_SUFFIXES)}."
        )
    rows = read_rows(path, "task_file")
    if len(rows) < FEWEST:
        raise UserError(
            f"task_file: {path.name} has {len(rows)} rows: give at least {FEWEST}, so that they "
            "can be split into train, dev and validation."
        )
    order = permutation(len(rows), 0)
    test = round(TEST_SHARE * len(rows))
    return {
        "train": [rows[i] for i in sorted(order[test:])],
        "validation": [rows[i] for i in sorted(order[:test])],
    }


def _in_folder(folder: Path, split: str) -> Path:
    found = find_split(folder, split, OWN_SUFFIXES)
    if found is None:
        raise UserError(
            f"task_file: {folder} has no {split}.csv, .jsonl, .jsonl.gz or .parquet: give a folder "
            "that holds train and validation, or one file."
        )
    return found


def own_dev(job: TaskChoice, train: int) -> int:
    """How many of ``train`` training rows are held out for dev: a tenth of all, at most 500."""
    single = not Path(job.task_file or "").expanduser().is_dir()
    count = train / (1 - TEST_SHARE) if single else train
    return min(MOST_DEV, max(1, round(DEV_SHARE * count)))


def check_fields(task: TaskInfo, rows: Sequence[dict[str, Any]]) -> None:
    """Hold the template and the label field against the fields that the rows have.

    Raises:
        UserError: one is missing.
    """
    if not rows:
        return
    has = ", ".join(map(str, rows[0]))
    for name in task.fields:
        if name not in rows[0]:
            raise UserError(f"template: {{{name}}} is not a field of the rows: use one of {has}.")
    if task.label_field not in rows[0]:
        raise UserError(
            f"label_field: {task.label_field!r} is not a field of the rows: use one of {has}."
        )
