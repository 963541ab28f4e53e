"""The tune and replay recipes in this process: every kind of run ends, replays, and resumes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zo_core import runs
from zo_core.errors import UserError
from zo_core.jobs import ReplayJob, TuneJob
from zo_core.models import resident
from zo_core.progress import Cancelled, JobContext
from zo_core.recipes import tune as tune_recipe
from zo_core.recipes.replay import run_replay
from zo_core.recipes.tune import run_tune
from zo_core.runs import Run
from zo_core.settings import settings
from zo_core.tasks.data import load_task
from zo_core.zo.checkpoint import read_checkpoint

SMALL: dict[str, Any] = {
    **{"batch_size": 2, "steps": 4, "train_examples": 16, "dev_examples": 8, "eval_examples": 8},
    "device": "cpu",
}
CASES: list[dict[str, Any]] = [
    {"scope": "attention:auto", "optimizer": "momentum", "directions": 2, "accumulate": 2},
    {"scope": "channels:auto:top1%", "estimator": "one-sided", "noise": "sphere"},
    {"scope": "mlp:3", "precision": "inplace", "optimizer": "conservative"},
    {"scope": "random-layer:1", "precision": "fp32", "optimizer": "adamm"},
    {"scope": "lora:auto", "schedule": "cosine", "warmup_steps": 2},
    {"scope": "prefix", "optimizer": "sign"},
]


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)


def go(job: TuneJob | ReplayJob, run: Run | None = None, end: str = "done") -> Run:
    """Run a job here, as the worker does."""
    run = run or runs.create(job, None)
    recipe: Callable[..., None] = run_tune if isinstance(job, TuneJob) else run_replay
    recipe(job, run, JobContext(run))
    run.update(state=end)
    return run


def summary(run: Run) -> dict[str, Any]:
    found = run.result_json()
    assert found is not None
    return found


@pytest.mark.parametrize("fields", CASES, ids=lambda f: f["scope"])
def test_a_run_replays_to_its_checkpoint(fields: dict[str, Any]) -> None:
    """Summary, ledger and checkpoint agree, and the resident model is pristine."""
    job = TuneJob(**(SMALL | fields))
    run = go(job)
    found = summary(run)
    assert found["tuned_parameters"] > 0
    assert 0 <= found["changed"] <= 1
    assert "auto" not in found["resolved_scope"]
    assert found["path"] == ("reference" if job.reference_only else "fast")
    steps = [r for r in run.read_metrics()[0] if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert found["forward_passes"] == steps[-1]["forward_passes"]
    answer = summary(go(ReplayJob(run=run.run_id, device="cpu")))
    assert answer == {
        "run_id": run.run_id,
        "steps": 4,
        "identical": True,
        "max_difference": 0.0,
        "device": "cpu",
    }
    loaded = resident.acquire(job, lambda _line: None)
    assert all("lora" not in n for n, _ in loaded.model.named_parameters())
    assert not loaded.model._forward_pre_hooks


def test_adamw_resumes_from_its_checkpoint_and_is_not_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cancelled between checkpoints, the steps after the last one are run again, not doubled."""
    fields = SMALL | {"scope": "layer:3", "optimizer": "adamw", "checkpoint_every": 2, "steps": 6}
    job = TuneJob(**fields)
    whole = go(job)
    run = runs.create(job, None)
    appended = Run.append_metrics

    def stop_after(self: Run, record: dict[str, Any]) -> None:
        appended(self, record)
        if record["kind"] == "step" and record["step"] == 3:
            raise Cancelled

    saved: list[int] = []
    keep = tune_recipe.save_checkpoint

    def save(*args: Any) -> None:
        if args[-1] % 2 == 0:  # the process was killed: no last checkpoint
            saved.append(args[-1])
            keep(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append_metrics", stop_after)
        patch.setattr(tune_recipe, "save_checkpoint", save)
        with pytest.raises(Cancelled):
            go(job, run)
    assert saved == [2]
    go(job, run)
    ends = [read_checkpoint(r.path / "checkpoint.safetensors") for r in (whole, run)]
    assert ends[0].step == ends[1].step == 6
    for part in ("weights", "state"):
        one, other = (getattr(end, part) for end in ends)
        assert one.keys() == other.keys() != set()
        assert all(torch.equal(one[n], other[n]) for n in one)
    steps = [r["step"] for r in run.read_metrics()[0] if r["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert summary(run)["forward_passes"] == summary(whole)["forward_passes"] == 6
    with pytest.raises(UserError, match="no ledger to replay"):
        go(ReplayJob(run=run.run_id, device="cpu"))


def test_replay_says_what_is_missing() -> None:
    """An unknown run, and one that has no checkpoint yet."""
    with pytest.raises(UserError, match="20260101-000000-tune-0000aa"):
        go(ReplayJob(run="20260101-000000-tune-0000aa"))
    run = runs.create(TuneJob(), None)
    run.update(state="cancelled")
    with pytest.raises(UserError, match="no checkpoint to compare with"):
        go(ReplayJob(run=run.run_id))


def test_prefix_refuses_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is loaded."""
    data = load_task("reviews")
    generating = replace(data, task=replace(data.task, generates=True))
    monkeypatch.setattr(tune_recipe, "load_job_task", lambda *_: generating)
    monkeypatch.setattr(tune_recipe, "acquire", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="prefix cannot generate the answers of reviews"):
        go(TuneJob(scope="prefix"))


def test_a_layer_out_of_range_is_found_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every form that numbers layers."""
    monkeypatch.setattr(tune_recipe, "acquire", lambda *_: pytest.fail("loaded"))
    for scope in ("layer:16", "layers:3,16", "channels:16:top1%", "lora:16", "all-but:16"):
        with pytest.raises(UserError, match="layers 0 to 15"):
            go(TuneJob(scope=scope))


def test_an_fp8_suffix_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine without such a GPU, whatever the job says of devices."""
    monkeypatch.setattr(tune_recipe, "pick_device", lambda _device: torch.device("cpu"))

    def load(*_args: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(tune_recipe, "acquire", load)
    with pytest.raises(UserError, match="suffix: fp8 needs an NVIDIA GPU"):
        go(TuneJob(suffix="fp8", steps=2))
