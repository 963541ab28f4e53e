"""Files that a power cut left out of step: each of them rebuilds what the other lost."""

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from zo_core import runs
from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.progress import Cancelled, JobContext
from zo_core.recipes.tune import run_tune
from zo_core.runs import Run
from zo_core.zo.checkpoint import BEST, NAME, step_of

pytestmark = pytest.mark.usefixtures("own_store")

JOB = TuneJob(
    scope="layer:14",
    steps=12,
    batch_size=2,
    train_examples=16,
    dev_examples=4,
    eval_examples=4,
    eval_every=3,
    weight_decay=0.01,
    checkpoint_every=5,
    seed=7,
    device="cpu",
)
STOPPED_AT = 8
TIMES = {"seconds", "eval_seconds"}


def go(run: Run) -> Run:
    run_tune(JOB, run, JobContext(run))
    run.update(state="done")
    return run


@pytest.fixture(scope="module")
def uninterrupted(own_store: None) -> Run:
    """The run that nothing happens to."""
    return go(runs.create(JOB, None))


@pytest.fixture(scope="module")
def cancelled(own_store: None) -> Run:
    """A run that was cancelled some steps after its first checkpoint, and saved where it was."""
    run = runs.create(JOB, None)
    appended = Run.append_metrics

    def append(self: Run, record: dict[str, Any]) -> None:
        appended(self, record)
        if (record["kind"], record["step"]) == ("step", STOPPED_AT):
            raise Cancelled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "append_metrics", append)
        with pytest.raises(Cancelled):
            go(run)
    assert step_of(run.path / NAME) == STOPPED_AT
    return run


@pytest.fixture
def copied(cancelled: Run) -> Run:
    """The cancelled run again, under an id of its own, as if it came back from a backup."""
    run_id = f"{cancelled.run_id[:-6]}{secrets.token_hex(3)}"
    return Run(Path(shutil.copytree(cancelled.path, cancelled.path.with_name(run_id))))


def tear_ledger(run: Run) -> None:
    """A line half written: the checkpoint is of a step that the ledger no longer has."""
    ledger = run.path / "metrics.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-9])


def shorten_ledger(run: Run) -> None:
    """Far behind the checkpoint."""
    ledger = run.path / "metrics.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:6]))


def lose_checkpoint(run: Run) -> None:
    (run.path / NAME).unlink()


def lose_best(run: Run) -> None:
    (run.path / BEST).unlink()


def cut_checkpoint(run: Run) -> None:
    file = run.path / NAME
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage", [tear_ledger, shorten_ledger, lose_checkpoint, lose_best, cut_checkpoint]
)
def test_resumed_with_the_same_bits(
    uninterrupted: Run, copied: Run, damage: Callable[[Run], None]
) -> None:
    damage(copied)
    go(copied)
    for name in (NAME, BEST):
        ours, theirs = load_file(copied.path / name), load_file(uninterrupted.path / name)
        assert ours.keys() == theirs.keys()
        for tensor, value in theirs.items():
            # Of the bits: == takes 0.0 and -0.0 for equal.
            assert torch.equal(ours[tensor].view(torch.int32), value.view(torch.int32)), tensor
    ledgers = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in run.read_metrics()[0]]
        for run in (copied, uninterrupted)
    ]
    assert ledgers[0] == ledgers[1]
    results = [run.result_json() or {} for run in (copied, uninterrupted)]
    for key in ("before", "after", "best_step", "forward_passes", "eval_forward_passes"):
        assert results[0][key] == results[1][key], key


def test_a_ledger_with_a_gap_is_refused(copied: Run) -> None:
    ledger = copied.path / "metrics.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    kept = "".join(x for x in lines if (r := json.loads(x))["kind"] != "step" or r["step"] != 4)
    assert len(kept) < sum(map(len, lines))
    ledger.write_text(kept)
    with pytest.raises(UserError, match="has a gap: it cannot be resumed"):
        go(copied)
    assert ledger.read_text() == kept, "nothing is lost by trying"
