"""Rows of a task: bundled, from a local folder, or from the hub through ``datasets``."""

import gzip
import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet

from zo_core.errors import UserError
from zo_core.settings import settings
from zo_core.tasks.catalog import SAMPLES, TaskInfo, find_task

SPLITS = ("train", "validation")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task with the rows of both splits."""

    task: TaskInfo
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    source: str


def load_task(
    name: str,
    data_dir: Path | None = None,
    train_examples: int | None = None,
    eval_examples: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Load and check a task's rows.

    Args:
        name: a key of ``TASKS``.
        data_dir: folder that holds ``<task>/{train,validation}`` as ``.jsonl``, ``.jsonl.gz`` or
            ``.parquet`` in Hugging Face field names; falls back to ``ZO_DATA_DIR``.
        train_examples: at most so many training rows, drawn with ``seed``.
        eval_examples: at most so many validation rows, the first ones.
        seed: of the draw.

    Raises:
        UserError: unknown task, missing or empty data, missing fields, or labels that do not match.
    """
    task = find_task(name)
    folder = data_dir or (None if task.bundled else settings().data_dir)
    if folder is not None:
        root = Path(folder).expanduser() / name
        rows = {split: _read(_split_file(root, split, folder)) for split in SPLITS}
        source = "local folder"
    elif task.bundled:
        root = SAMPLES / name
        rows = {split: _read(_split_file(root, split, root)) for split in SPLITS}
        source = "bundled"
    else:
        rows = _from_hub(task)
        source = f"hub: {task.hub[0] if task.hub else name}"
    for split in SPLITS:
        _check(task, split, rows[split])
    train, validation = rows["train"], rows["validation"]
    if train_examples is not None and train_examples < len(train):
        train = random.Random(seed).sample(train, train_examples)  # noqa: S311 - a reproducible draw
    return TaskData(task, train, validation[:eval_examples], source)


def _split_file(root: Path, split: str, given: Path) -> Path:
    for suffix in SUFFIXES:
        if (root / f"{split}{suffix}").is_file():
            return root / f"{split}{suffix}"
    raise UserError(
        f"data_dir: {given} has no {root.name}/{split}.jsonl, .jsonl.gz or .parquet: give the "
        f"folder that holds {root.name}/train and {root.name}/validation."
    )


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"data_dir: {path} cannot be read: {error}.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"data_dir: every line of {path} must be a JSON object.")
    return rows


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


def _check(task: TaskInfo, split: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        raise UserError(f"task: the {split} split of {task.name} has no rows.")
    for number, row in enumerate(rows):
        missing = [f for f in (*task.fields, task.label_field) if row.get(f) is None]
        if missing:
            raise UserError(
                f"task: row {number} of {task.name}/{split} has no field {missing[0]!r}; it has "
                f"{', '.join(map(str, row))}."
            )
        label = row[task.label_field]
        if label not in range(len(task.candidates)):
            raise UserError(
                f"task: row {number} of {task.name}/{split} has label {label!r}; {task.name} knows "
                f"0 to {len(task.candidates) - 1} ({', '.join(task.candidates)})."
            )
