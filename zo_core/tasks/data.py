"""Rows of a task: bundled, from a local folder, from the hub, or the user's own; and their splits.

The split rule is in :mod:`zo_core.tasks.splits`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_core.errors import UserError
from zo_core.jobs import TaskChoice
from zo_core.settings import settings
from zo_core.tasks.catalog import OWN, SAMPLES, TaskInfo, find_task
from zo_core.tasks.files import find_split, read_rows
from zo_core.tasks.own import check_fields, own_dev, own_rows, own_task
from zo_core.tasks.splits import SPLITS, evaluated, train_and_dev

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task with its rows."""

    task: TaskInfo
    train: Rows
    dev: Rows
    """Held out of the training split: to choose settings and checkpoints by."""
    validation: Rows
    """Of the validation split: what results are reported on (MeZO's test rows)."""
    source: str


def load_job_task(
    job: TaskChoice,
    train_examples: int | None = None,
    eval_examples: int | None = None,
    seed: int = 0,
    dev_examples: int | None = None,
) -> TaskData:
    """The rows of the task that a job names, the user's own one included; see :func:`load_task`."""
    if job.task != OWN:
        return load_task(job.task, job.data_dir, train_examples, eval_examples, seed, dev_examples)
    task = own_task(job)
    rows = own_rows(job)
    for split in SPLITS:
        check_fields(task, rows[split])
        _check(task, split, rows[split])
    dev = own_dev(job, len(rows["train"])) if dev_examples is None else dev_examples
    return _split(task, rows, "own file", train_examples, eval_examples, seed, dev)


def load_task(
    name: str,
    data_dir: Path | None = None,
    train_examples: int | None = None,
    eval_examples: int | None = None,
    seed: int = 0,
    dev_examples: int | None = None,
) -> TaskData:
    """Load, check and split a task's rows.

    Args:
        name: a key of ``TASKS``.
        data_dir: folder that holds ``<task>/{train,validation}`` as ``.jsonl``, ``.jsonl.gz`` or
            ``.parquet`` in Hugging Face field names; falls back to ``ZO_DATA_DIR``.
        train_examples: at most so many training rows; None: all that are not dev rows.
        eval_examples: at most so many validation rows; None: all.
        seed: of the permutation of the training split.
        dev_examples: rows held out of the training split; None: as many as the task says.

    Raises:
        UserError: unknown task, missing, empty or too few rows, missing fields, or labels that do
            not match.
    """
    task = find_task(name)
    folder = data_dir or (None if task.bundled else settings().data_dir)
    if folder is not None:
        root = Path(folder).expanduser() / name
        rows = {split: read_rows(split_file(root, split, folder)) for split in SPLITS}
        source = "local folder"
    elif task.bundled:
        root = SAMPLES / name
        rows = {split: read_rows(split_file(root, split, root)) for split in SPLITS}
        source = "bundled"
    else:
        rows = _from_hub(task)
        source = f"hub: {task.hub[0] if task.hub else name}"
    for split in SPLITS:
        _check(task, split, rows[split])
    dev = task.dev if dev_examples is None else dev_examples
    return _split(task, rows, source, train_examples, eval_examples, seed, dev)


def _split(
    task: TaskInfo,
    rows: dict[str, Rows],
    source: str,
    train_examples: int | None,
    eval_examples: int | None,
    seed: int,
    dev: int,
) -> TaskData:
    """Apply the split rule.

    Raises:
        UserError: no row is left to train on.
    """
    train = rows["train"]
    if len(train) <= dev:
        raise UserError(
            f"dev_examples: the train split of {task.name} has {len(train)} rows and {dev} of them "
            f"would be held out: lower dev_examples to at most {len(train) - 1}."
        )
    kept, held_out = train_and_dev(train, train_examples, dev, seed)
    return TaskData(task, kept, held_out, evaluated(rows["validation"], eval_examples), source)


def split_file(root: Path, split: str, given: Path) -> Path:
    """The file of a split in a task's folder.

    Args:
        root: the task's folder.
        split: its split.
        given: the folder that the user named.

    Raises:
        UserError: there is none.
    """
    found = find_split(root, split)
    if found is None:
        raise UserError(
            f"data_dir: {given} has no {root.name}/{split}.jsonl, .jsonl.gz or .parquet: give the "
            f"folder that holds {root.name}/train and {root.name}/validation."
        )
    return found


def _from_hub(task: TaskInfo) -> dict[str, list[dict[str, Any]]]:
    import datasets
    from huggingface_hub import HfApi

    assert task.hub is not None, task.name
    name, configuration = task.hub
    offline = (
        f"task: {task.name} is not in the local datasets cache and the hub is out of reach: give "
        f"--data-dir (or ZO_DATA_DIR) a folder with {task.name}/train.jsonl and "
        f"{task.name}/validation.jsonl, or use the bundled task reviews."
    )
    try:
        HfApi().dataset_info(name, revision=task.hub_revision, timeout=10)
    except Exception:  # any failure to reach the hub: only the cache is left
        datasets.config.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(name, configuration, revision=task.hub_revision)
    except Exception as error:  # datasets raises many kinds when there is no network
        raise UserError(offline) from error
    return {split: [dict(row) for row in loaded[split]] for split in SPLITS}


def _check(task: TaskInfo, split: str, rows: Sequence[dict[str, Any]]) -> None:
    """Render every row, so that a wrong one is named before a model is loaded.

    Raises:
        UserError: there is none, or one lacks a field, an answer or a label of the task.
    """
    if not rows:
        raise UserError(f"task: the {split} split of {task.name} has no rows.")
    fields = task.fields if task.generates else (*task.fields, task.label_field)
    for number, row in enumerate(rows):
        missing = [f for f in fields if row.get(f) is None]
        if missing:
            raise UserError(
                f"task: row {number} of {task.name}/{split} has no field {missing[0]!r}; it has "
                f"{', '.join(map(str, row))}."
            )
        try:
            task.render(row)
        except ValueError as error:
            raise UserError(f"task: row {number} of {task.name}/{split} {error}.") from error
