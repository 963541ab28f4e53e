"""The tasks that ZOScope knows: names, fields, hub addresses and prompts. No torch here."""

from dataclasses import dataclass
from pathlib import Path

from zo_core.errors import UserError

SAMPLES = Path(__file__).resolve().parent / "samples"


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A classification task: prompt, then one of the candidate words (MeZO's prompts)."""

    name: str
    title: str
    description: str
    metric: str
    bundled: bool
    prompt: str
    """Format string over the row's fields; the candidate follows after a space."""
    candidates: tuple[str, ...]
    """The word of each label, in label order."""
    fields: tuple[str, ...]
    label_field: str = "label"
    hub: tuple[str, str] | None = None
    """(hub id, configuration) for ``datasets``."""
    hub_revision: str | None = None


TASKS: dict[str, TaskInfo] = {
    task.name: task
    for task in (
        TaskInfo(
            name="reviews",
            title="Film reviews (bundled)",
            description="One-line film reviews written for ZOScope: positive or negative.",
            metric="accuracy",
            bundled=True,
            prompt="{sentence} It was",
            candidates=("terrible", "great"),
            fields=("sentence",),
        ),
        TaskInfo(
            name="sst2",
            title="SST-2",
            description="Stanford Sentiment Treebank: positive or negative film-review sentences.",
            metric="accuracy",
            bundled=False,
            prompt="{sentence} It was",
            candidates=("terrible", "great"),
            fields=("sentence",),
            hub=("nyu-mll/glue", "sst2"),
        ),
    )
}


def find_task(name: str) -> TaskInfo:
    """The task of that name.

    Raises:
        UserError: it is unknown; the sentence lists the choices.
    """
    if name not in TASKS:
        raise UserError(f"task: {name!r} is unknown: choose one of {', '.join(TASKS)}.")
    return TASKS[name]
