"""Trackers: other tools that show a run's metrics as well. Nothing leaves the machine unasked.

``metrics.jsonl`` is the truth and a tracker a copy of it, so a tracker that fails is dropped and
the run goes on. Each is an optional package:

* ``tensorboard``: event files in ``tensorboard/`` of the run folder. A resumed run writes them
  anew from its metrics.
* ``trackio``: its local database (``trackio show --project zoscope``).
* ``wandb``: an offline run in ``wandb/`` of the run folder (``wandb sync``), unless ``WANDB_MODE``
  says otherwise.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.runs import Run

PROJECT = "zoscope"
NOT_DRAWN = {"kind", "step", "split", "examples", "g"}
"""Keys of a metric record that are no curve of their own."""


class Tracker(Protocol):
    """A place where a run's scalars go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the scalars of a step, by name; steps may come again and out of order."""

    def close(self) -> None:
        """Write what is held back."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, job: TuneJob, run: Run, records: Iterable[dict[str, Any]]) -> None:
        """Begin with what the run has recorded so far: a kill may have lost the last events."""
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder), flush_secs=5)
        for record in records:
            self.log(record["step"], scalars(record))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class Trackio:
    """A run of that name in trackio's project; resumed under the same name."""

    def __init__(self, job: TuneJob, run: Run, records: Iterable[dict[str, Any]]) -> None:
        """Begin or go on."""
        self._run = import_module("trackio").init(
            project=PROJECT,
            name=run.run_id,
            config=job.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._run.finish()


class Wandb:
    """A W&B run with the id of ours; each resume is one more offline folder of that id."""

    def __init__(self, job: TuneJob, run: Run, records: Iterable[dict[str, Any]]) -> None:
        """Begin or go on."""
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode != "online":  # wandb reports its own errors over the network, offline or not
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=PROJECT,
            id=run.run_id,
            name=run.run_id,
            config=job.model_dump(mode="json"),
            dir=str(run.path),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )
        # W&B's own step only ever grows, and evaluations of earlier steps come later.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._run.finish()


TRACKERS: dict[str, Callable[[TuneJob, Run, Iterable[dict[str, Any]]], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}
"""Name, which is also the package's -> how to begin."""


def check(names: Iterable[str]) -> None:
    """Find out whether trackers can be used, without importing them.

    Raises:
        UserError: a package is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"track: the package {name} is not installed where the job runs: "
                f"pip install {name} there, or leave {name} out."
            )


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The curves that a metric record adds to, by name: ``train/loss``, ``dev/accuracy``, ..."""
    group = record.get("split", "train")
    found = {
        f"{group}/{name}": float(value)
        for name, value in record.items()
        if name not in NOT_DRAWN and isinstance(value, int | float)
    }
    g = record.get("g")
    if g:
        found[f"{group}/abs_g"] = sum(map(abs, g)) / len(g)
    return found


class Trackers:
    """The trackers of a run, each dropped once it fails."""

    def __init__(
        self,
        job: TuneJob,
        run: Run,
        records: Iterable[dict[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        """Begin them.

        Args:
            job: names them.
            run: the run.
            records: its metric records so far.
            say: told when one fails.
        """
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in job.track:
            try:
                self._open[name] = TRACKERS[name](job, run, records)
            except Exception as error:
                self._drop(name, error)

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass a new metric record on."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(record["step"], scalars(record))
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        """End them."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.close()
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        self._say(f"{name} is left out from here on: {type(error).__name__}: {error}")
