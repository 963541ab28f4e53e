"""Dev evaluations: the best step is kept, also over a kill, and patience ends a run."""

from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch

from zo_core import runs
from zo_core.jobs import ReplayJob, TuneJob, explain
from zo_core.models import resident
from zo_core.progress import Cancelled, JobContext
from zo_core.recipes import evaluations
from zo_core.recipes import tune as tune_recipe
from zo_core.recipes.replay import run_replay
from zo_core.recipes.tune import run_tune
from zo_core.runs import Run
from zo_core.scope_spec import parse
from zo_core.settings import settings
from zo_core.tasks.data import load_task
from zo_core.zo.checkpoint import BEST, NAME, read_checkpoint, rebuild, step_of
from zo_core.zo.scopes import select
from zo_core.zo.trainer import make_optimizer, make_scope

FIELDS: dict[str, Any] = {
    **{"batch_size": 2, "train_examples": 16, "dev_examples": 4, "eval_examples": 6},
    **{"steps": 6, "eval_every": 2, "checkpoint_every": 3, "scope": "layer:14", "device": "cpu"},
}
LOSSES = {0: 0.7, 2: 0.6, 4: 0.5, 6: 0.5}
"""Dev losses that make step 4 the best: an equal one later does not count."""
TIMES = {"seconds", "eval_seconds"}


class Killed(BaseException):
    """Stands for a kill: nothing of the run may react to it but ``finally``."""


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)


@pytest.fixture
def dev_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[float]], None]:
    """Sets what the next dev evaluations find; validation stays as it is."""
    measured = evaluations.evaluate

    def plan(losses: Iterable[float]) -> None:
        waiting = iter(losses)

        def stand_in(task: Any, loaded: Any, forward: Any, rows: Any, *rest: Any) -> Any:
            found = measured(task, loaded, forward, rows, *rest)
            return found | {"loss": next(waiting)} if len(rows) == 4 else found

        monkeypatch.setattr(evaluations, "evaluate", stand_in)

    return plan


def go(job: TuneJob, run: Run | None = None) -> Run:
    """Run or resume a job to its end."""
    run = run or runs.create(job, None)
    run_tune(job, run, JobContext(run))
    run.update(state="done")
    return run


def summary(run: Run) -> dict[str, Any]:
    found = run.result_json()
    assert found is not None
    return found


def records(run: Run, kind: str = "eval") -> list[dict[str, Any]]:
    found = [r for r in run.read_metrics()[0] if r["kind"] == kind]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in found]


def where(run: Run) -> list[tuple[str, int]]:
    return [(r["split"], r["step"]) for r in records(run)]


def weights(run: Run, name: str = BEST) -> dict[str, torch.Tensor]:
    return read_checkpoint(run.path / name).weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() != set() and all(torch.equal(one[n], other[n]) for n in one)


def replayed(run: Run, job: TuneJob, steps: int) -> dict[str, torch.Tensor]:
    """The weights of a step, from base weights and ledger alone."""
    loaded = resident.acquire(job, lambda _line: None)
    ledger = [r for r in run.read_metrics()[0] if r["kind"] == "step"]
    with closing(select(loaded, parse(job.scope), None, job.seed)) as selection:
        scope = make_scope(job, selection)
        with closing(scope):
            rebuild(job, scope, make_optimizer(job), ledger[:steps])
            return scope.snapshot()


@pytest.mark.parametrize(
    "more", [{}, {"optimizer": "momentum"}, {"precision": "inplace"}, {"scope": "lora:14"}]
)
def test_best_is_that_of_the_ledger(dev_losses: Any, more: dict[str, Any]) -> None:
    """Evaluated in order: step 0 with the base weights, at the first evaluation after it."""
    job = TuneJob(**FIELDS | more)
    dev_losses(LOSSES.values())
    run = go(job)
    wanted = [("validation", 0), ("dev", 0), ("dev", 2), ("dev", 4), ("dev", 6), ("validation", 4)]
    assert where(run) == wanted
    found = summary(run)
    assert (found["best_step"], found["kept"], found["steps"]) == (4, "best", 6)
    assert found["stopped_early_at"] is None
    assert found["dev"]["loss"] == 0.5
    assert found["after"]["loss"] == records(run)[-1]["loss"]
    assert found["forward_passes"] == 2 * 6
    # 4 dev rows four times and 6 validation rows twice, in batches of 2
    assert found["eval_forward_passes"] == 4 * 2 + 2 * 3
    assert found["eval_seconds"] > 0
    assert step_of(run.path / BEST) == 4
    assert step_of(run.path / NAME) == 6
    assert not same(weights(run), weights(run, NAME))
    assert same(weights(run), replayed(run, job, 4))
    replay = runs.create(ReplayJob(run=run.run_id, device="cpu"), None)
    run_replay(replay.job, replay, JobContext(replay))  # type: ignore[arg-type]
    assert summary(replay)["identical"], "the ledger rebuilds the last weights"


def test_validation_after_is_of_the_best_weights(dev_losses: Any) -> None:
    """The same outcome as a run that ends at the best step."""
    dev_losses(LOSSES.values())
    found = summary(go(TuneJob(**FIELDS, lr=5e-3)))
    dev_losses(LOSSES.values())
    short = summary(go(TuneJob(**FIELDS | {"steps": 4}, lr=5e-3)))
    assert found["after"] == short["after"] != found["before"]
    dev_losses(LOSSES.values())
    last = go(TuneJob(**FIELDS, lr=5e-3, keep="last"))
    assert summary(last)["kept"] == "last"
    assert summary(last)["best_step"] == 4
    assert summary(last)["after"] != found["after"]
    assert where(last)[-1] == ("validation", 6)
    assert not (last.path / BEST).exists()


def test_a_run_that_never_improves_keeps_the_base_weights(dev_losses: Any) -> None:
    dev_losses([0.5, 0.6, 0.5, 0.7])
    run = go(TuneJob(**FIELDS))
    found = summary(run)
    assert found["best_step"] == 0
    assert found["after"] == found["before"]
    assert where(run)[-1] == ("dev", 6), "validation at step 0 is known"
    assert step_of(run.path / BEST) == 0


@pytest.mark.parametrize("fields", [{"dev_examples": 0}, {"eval_every": 0}])
def test_without_dev_evaluations_the_last_weights_are_kept(fields: dict[str, int]) -> None:
    run = go(TuneJob(**FIELDS | fields))
    found = summary(run)
    assert (found["kept"], found["best_step"], found["dev"]) == ("last", None, None)
    assert where(run) == [("validation", 0), ("validation", 6)]
    assert f"{next(iter(fields))} is 0: the last weights are kept" in run.log_text()
    assert not (run.path / BEST).exists()


def test_patience_stops(dev_losses: Any) -> None:
    """After two evaluations that are no better than the best."""
    dev_losses(chain([0.7, 0.5, 0.6, 0.5], repeat(0.1)))
    job = TuneJob(**FIELDS | {"steps": 100, "eval_every": 3, "patience": 2})
    run = go(job)
    found = summary(run)
    assert (found["steps"], found["stopped_early_at"], found["best_step"]) == (9, 9, 3)
    assert "Stopped early at step 9: the dev loss has not improved on that of step 3" in (
        run.log_text()
    )
    assert len(records(run, "step")) == 9
    assert found["forward_passes"] == 18
    assert step_of(run.path / NAME) == 9
    assert run.status().state == "done"


@pytest.mark.parametrize("fields", [{"eval_every": 0}, {"dev_examples": 0}])
def test_patience_needs_dev_evaluations(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="patience") as caught:
        TuneJob(patience=1, **fields)
    assert "raise eval_every and dev_examples" in explain(caught.value)  # type: ignore[arg-type]


MOMENTS = ["before the record", "before the file", "after the file", "in the last evaluation"]


@pytest.mark.parametrize(
    ("moment", "optimizer"),
    [*((m, "zo-sgd") for m in MOMENTS), *((m, "adamw") for m in MOMENTS[:2])],
)
def test_killed_around_the_best(
    monkeypatch: pytest.MonkeyPatch, dev_losses: Any, moment: str, optimizer: str
) -> None:
    """Whatever a kill leaves of step 4, the resumed run is the uninterrupted one."""
    job = TuneJob(**FIELDS, optimizer=optimizer, patience=9)
    dev_losses(LOSSES.values())
    whole = go(job)
    run = runs.create(job, None)
    appended, save_best = Run.append_metrics, evaluations.save_best

    def append(self: Run, record: dict[str, Any]) -> None:
        if moment == "before the record" and record["kind"] == "eval" and record["step"] == 4:
            raise Killed
        if moment == "in the last evaluation" and (record.get("split"), record["step"]) == (
            "validation",
            4,
        ):
            raise Killed
        appended(self, record)

    def save(run: Run, job: TuneJob, tensors: Any, step: int) -> None:
        if moment == "before the file" and step == 4:
            raise Killed
        save_best(run, job, tensors, step)
        if moment == "after the file" and step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append_metrics", append)
        patch.setattr(evaluations, "save_best", save)
        patch.setattr(tune_recipe.TunedScope, "settled", False)  # no parting checkpoint
        dev_losses(LOSSES.values())
        with pytest.raises(Killed):
            go(job, run)
    left = {"before the record": 2, "before the file": 2}.get(moment, 4)
    assert step_of(run.path / BEST) == left
    dev_losses([0.5, 0.5] if moment == "before the record" else [0.5])
    go(job, run)
    assert records(run) == records(whole)
    assert records(run, "step") == records(whole, "step")
    assert same(weights(run), weights(whole))
    assert same(weights(run, NAME), weights(whole, NAME))
    for key in ("before", "after", "best_step", "dev", "kept", "eval_forward_passes"):
        assert summary(run)[key] == summary(whole)[key], key


@pytest.mark.parametrize(
    ("damage", "optimizer"),
    [("lost", "zo-sgd"), ("cut", "zo-sgd"), ("of another step", "zo-sgd"), ("lost", "adamw")],
)
def test_best_file_that_a_power_cut_spoilt(
    monkeypatch: pytest.MonkeyPatch, dev_losses: Any, damage: str, optimizer: str
) -> None:
    """The ledger rebuilds it; adamw has none, and goes on with the next best."""
    job = TuneJob(**FIELDS | {"steps": 8}, optimizer=optimizer)
    losses = [0.7, 0.4, 0.5, 0.6, 0.6]
    dev_losses(losses)
    whole = go(job)
    run = runs.create(job, None)
    appended = Run.append_metrics

    def append(self: Run, record: dict[str, Any]) -> None:
        appended(self, record)
        if record["step"] == 5:
            raise Cancelled

    dev_losses(losses)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "append_metrics", append)
        with pytest.raises(Cancelled):
            go(job, run)
    file = run.path / BEST
    assert step_of(file) == 2
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        evaluations.save_best(run, job, weights(run), 4)
    dev_losses([0.6, 0.6])
    go(job, run)
    if optimizer == "adamw":
        assert "The best weights, of step 2, are lost" in run.log_text()
        assert summary(run)["best_step"] == step_of(file) == 6
    else:
        assert same(weights(run), weights(whole))
        assert summary(run)["after"] == summary(whole)["after"]
    assert same(weights(run, NAME), weights(whole, NAME))


def test_killed_between_the_last_straw_and_the_end(
    monkeypatch: pytest.MonkeyPatch, dev_losses: Any
) -> None:
    """A run whose patience is used up takes no further step when it is resumed."""
    job = TuneJob(**FIELDS | {"steps": 100, "patience": 1, "checkpoint_every": 4})
    run = runs.create(job, None)
    keep = tune_recipe.save_checkpoint

    def killed(*args: Any) -> None:
        if args[-1] == 6:
            raise Killed
        keep(*args)

    dev_losses([0.7, 0.6, 0.5, 0.6])
    with monkeypatch.context() as patch:
        patch.setattr(tune_recipe, "save_checkpoint", killed)
        with pytest.raises(Killed):
            go(job, run)
    dev_losses([])
    found = summary(go(job, run))
    assert (found["stopped_early_at"], found["steps"], found["best_step"]) == (6, 6, 4)
    assert step_of(run.path / NAME) == 6


def test_resumes_a_run_that_recorded_no_dev_rows(
    monkeypatch: pytest.MonkeyPatch, dev_losses: Any
) -> None:
    """As begun by the version before: validation on the way, and no fingerprint of dev rows."""
    job = TuneJob(**FIELDS | {"steps": 8})
    run = runs.create(job, None)
    appended = Run.append_metrics

    def append(self: Run, record: dict[str, Any]) -> None:
        appended(self, record)
        if record["step"] == 3:
            raise Cancelled

    dev_losses(chain(LOSSES.values(), [0.8]))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "append_metrics", append)
        with pytest.raises(Cancelled):
            go(job, run)
    kept = [r for r in run.read_metrics()[0] if r.get("split") != "dev"]
    (run.path / "metrics.jsonl").write_text("")
    for record in kept:
        run.append_metrics(record)
    details = run.status().details
    del details["fingerprint"]["dev examples"]
    run.update(details=details)
    dev_losses([0.7, 0.5, 0.6, 0.6])
    assert summary(go(job, run))["best_step"] == 4


def test_dev_rows_are_no_training_rows() -> None:
    """Of the bundled task, for several seeds, and without a limit on training rows."""
    for seed in (0, 1, 7):
        data = load_task("reviews", train_examples=300, seed=seed)
        train, dev = ([r["sentence"] for r in rows] for rows in (data.train, data.dev))
        assert len(dev) == 100
        assert len(train) == 300
        assert not set(train) & set(dev)
    data = load_task("reviews")
    assert len(data.train) + len(data.dev) == 440
