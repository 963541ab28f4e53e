"""What is made of a valid spec, and found wrong with it, before anything is started."""

from pathlib import Path
from typing import Any

from zo_core.artifacts.place import prepare, prepare_ledger
from zo_core.errors import UserError
from zo_core.jobs import ExportJob, ReplayJob, TaskChoice
from zo_core.models.catalog import describe, resolve
from zo_core.scope_spec import parse
from zo_core.settings import settings
from zo_core.tasks.catalog import OWN, TASKS, find_task


def absolute(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields with absolute paths: the worker may have another working directory."""
    fields = dict(fields)
    task = TASKS.get(fields.get("task", ""))
    if task is not None and not task.bundled and settings().data_dir:
        fields.setdefault("data_dir", settings().data_dir)
    for name in ("data_dir", "task_file", "ledger", "out"):
        if fields.get(name) is not None:
            fields[name] = Path(fields[name]).expanduser().absolute()
    if fields.get("model"):
        source, folder = resolve(fields["model"])
        if source == "local":
            fields["model"] = str(Path(folder).absolute())
    return fields


def check(job: Any) -> None:
    """Find what is wrong with a valid spec before a run is made of it.

    Raises:
        UserError: an unknown task, a layer that the model does not have, a run that cannot be
            exported, or a path in use.
    """
    if isinstance(job, ExportJob):
        prepare(job)
    if isinstance(job, ReplayJob) and job.ledger is not None:
        prepare_ledger(job)
    if hasattr(job, "task"):
        _check_task(job)
    if not getattr(job, "model", None) or resolve(job.model)[0] == "hub":
        return  # the worker asks the hub
    layers = list(getattr(job, "layers", None) or [])
    if hasattr(job, "scope"):
        layers += parse(job.scope).numbers
    info = describe(job.model, getattr(job, "revision", None))
    for layer in layers:
        if layer >= info.n_layers:
            raise UserError(
                f"Layer {layer} is out of range: {job.model} has layers 0 to {info.n_layers - 1}."
            )


def _check_task(job: TaskChoice) -> None:
    if job.task != OWN:
        find_task(job.task)
        return
    from zo_core.tasks.data import load_job_task  # reads Parquet: slow to import

    load_job_task(job, dev_examples=0)


def check_folder(job: TaskChoice) -> None:
    """Find a data folder that lacks the rows of a task, unless the workers are elsewhere.

    Raises:
        UserError: it does.
    """
    if job.data_dir is None or job.task == OWN or settings().backend:
        return
    from zo_core.tasks.data import split_file

    for split in ("train", "validation"):
        split_file(job.data_dir.expanduser() / job.task, split, job.data_dir)
