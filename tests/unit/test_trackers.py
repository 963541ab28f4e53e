"""Trackers: what they are told is what the run recorded, and their failure is not the run's."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zo_core import runs, trackers
from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.progress import Cancelled, JobContext
from zo_core.recipes.tune import run_tune
from zo_core.runs import Run
from zo_core.settings import settings
from zo_core.trackers import Trackers, scalars

FIELDS: dict[str, Any] = {
    **{"batch_size": 2, "train_examples": 16, "dev_examples": 4, "eval_examples": 6},
    **{"steps": 4, "eval_every": 2, "scope": "layer:14", "device": "cpu"},
}


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)


def test_tensorboard_events_are_the_metrics_also_after_a_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every scalar once, read back with TensorBoard's own reader."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    job = TuneJob(**FIELDS, track="tensorboard")
    run = runs.create(job, None)
    appended = Run.append_metrics

    def append(self: Run, record: dict[str, Any]) -> None:
        appended(self, record)
        if record["kind"] == "step" and record["step"] == 3:
            raise Cancelled

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append_metrics", append)
        with pytest.raises(Cancelled):
            run_tune(job, run, JobContext(run))
    run_tune(job, run, JobContext(run))
    events = reader.EventAccumulator(str(run.path / "tensorboard"), {"scalars": 0})
    events.Reload()
    found = {
        (tag, event.step, event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    told = [
        (tag, record["step"], pytest.approx(value, rel=1e-6))
        for record in run.read_metrics()[0]
        for tag, value in scalars(record).items()
    ]
    assert {tag for tag, _, _ in found} >= {"train/loss", "train/abs_g", "dev/accuracy"}
    assert len(found) == len(told) == sum(len(events.Scalars(t)) for t in events.Tags()["scalars"])
    by_place = {(tag, step): value for tag, step, value in found}
    assert all(by_place[tag, step] == value for tag, step, value in told)
    assert "left out" not in run.log_text()


def test_scalars_of_a_record() -> None:
    step = {"kind": "step", "step": 3, "loss": 0.5, "loss_minus": None, "g": [-2.0, 1.0], "lr": 0.1}
    assert scalars(step) == {"train/loss": 0.5, "train/lr": 0.1, "train/abs_g": 1.5}
    found = {"kind": "eval", "step": 3, "split": "dev", "f1": 0.5, "loss": 1.0, "examples": 4}
    assert scalars(found) == {"dev/f1": 0.5, "dev/loss": 1.0}


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_missing_package_is_named_before_anything_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _name: None)
    job = TuneJob(track=name, task="sst2", data_dir=Path("nowhere"))
    run = runs.create(job, None)
    with pytest.raises(UserError, match=f"track: the package {name} is not installed .* pip"):
        run_tune(job, run, JobContext(run))


def test_a_tracker_that_fails_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, and says so once."""
    told: list[int] = []

    class Frail:
        def __init__(self, *_: object) -> None:
            """Begin."""

        def log(self, step: int, values: object) -> None:
            told.append(step)
            raise OSError("no space left")

        def close(self) -> None:
            pytest.fail("was dropped")

    monkeypatch.setitem(trackers.TRACKERS, "trackio", Frail)
    said: list[str] = []
    job = TuneJob(track="trackio")
    tracking = Trackers(job, runs.create(job, None), [], said.append)
    for step in (1, 2):
        tracking.log({"kind": "step", "step": step, "loss": 1.0})
    tracking.close()
    assert told == [1]
    assert said == ["trackio is left out from here on: OSError: no space left"]


class Told:
    """Stands for the run object of trackio and wandb."""

    def __init__(self) -> None:
        """Nothing told yet."""
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.ended = False

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Remember."""
        self.logged.append((values, step))

    def define_metric(self, name: str, step_metric: str) -> None:
        """As the run's own step is the x-axis."""
        assert (name, step_metric) == ("*", "step")

    def finish(self) -> None:
        """End."""
        self.ended = True


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_nothing_is_sent_by_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the packages are begun; that they take it was tried with the real ones."""
    given: dict[str, Any] = {}
    told = Told()

    def init(**options: Any) -> Told:
        given.update(options)
        return told

    module = SimpleNamespace(init=init, Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    job = TuneJob(track=name)
    run = runs.create(job, None)
    tracking = Trackers(job, run, [], pytest.fail)
    tracking.log({"kind": "step", "step": 2, "loss": 1.0})
    tracking.close()
    assert given["name"] == run.run_id
    assert given["config"]["scope"] == "layer:auto"
    assert told.ended
    if name == "wandb":
        assert given["mode"] == "offline"
        assert given["dir"] == str(run.path)
        assert told.logged == [({"step": 2, "train/loss": 1.0}, None)]
    else:
        assert not {"space_id", "server_url", "webhook_url"} & given.keys()
        assert told.logged == [({"train/loss": 1.0}, 2)]
