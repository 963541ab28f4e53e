"""Every task from rows to a finished run of three steps and two evaluations, bundled model."""

import math
from pathlib import Path

import pytest
import torch

from tests.unit.task_rows import ROWS, write_tasks
from zo_core import runs
from zo_core.jobs import PreviewJob, ProbeJob, TuneJob
from zo_core.models.load import LoadedModel
from zo_core.progress import JobContext
from zo_core.recipes.preview import run_preview
from zo_core.recipes.probe import run_probe
from zo_core.recipes.tune import run_tune
from zo_core.runs import Process, Run
from zo_core.settings import settings
from zo_core.tasks.catalog import TASKS
from zo_core.tasks.evaluate import evaluate
from zo_core.tasks.scoring import candidate_scores, task_loss
from zo_core.tasks.templates import encode_rows
from zo_core.zo.forward import FastForward
from zo_core.zo.packing import shared_start
from zo_core.zo.reference import ReferenceForward

KEYS = {"squad": {"f1", "em"}, "drop": {"f1", "em"}, "multirc": {"accuracy", "f1a"}}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run store and a data folder of their own."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path / "cache")
    return write_tasks(tmp_path / "data", train=20, validation=6)


def new_run(job: TuneJob | ProbeJob | PreviewJob) -> tuple[Run, JobContext]:
    run = runs.create(job, Process.current())
    return run, JobContext(run)


@pytest.mark.parametrize("task", ROWS)
def test_tune_and_evaluate(task: str, store: Path) -> None:
    job = TuneJob(
        task=task,
        data_dir=store,
        device="cpu",
        scope="layer:14",
        steps=3,
        batch_size=4,
        dev_examples=4,
        eval_every=0,
    )
    run, context = new_run(job)
    run_tune(job, run, context)
    summary = run.result_json() or {}
    wanted = KEYS.get(task, {"accuracy"}) | {"loss", "examples"}
    for when in ("before", "after"):
        assert set(summary[when]) == wanted
        assert summary[when]["examples"] == 6
        assert all(0 <= summary[when][key] <= 1 for key in wanted - {"loss", "examples"})
        assert math.isfinite(summary[when]["loss"])
    assert summary["metric"] == TASKS[task].metric
    assert (summary["train_examples"], summary["dev_examples"]) == (16, 4)
    assert summary["path"] == "fast"
    assert summary["truncated"] == {"train": 0, "dev": 0, "validation": 0}
    records = run.read_metrics()[0]
    steps = [r for r in records if r["kind"] == "step"]
    assert len(steps) == 3
    assert any(r["loss"] != steps[0]["loss"] for r in steps)
    evaluations = [r for r in records if r["kind"] == "eval"]
    keys = wanted | {"kind", "step", "split", "eval_seconds", "eval_forward_passes"}
    assert all(set(r) == keys for r in evaluations)
    assert [(r["split"], r["step"]) for r in evaluations] == [("validation", 0), ("validation", 3)]
    batches = 2  # of the 6 validation rows
    least = 2 * batches if TASKS[task].generates else batches
    assert all(r["eval_forward_passes"] >= least for r in evaluations)


@pytest.mark.parametrize("task", ["copa", "squad"])
def test_probe_needs_the_gold_option_alone(task: str, store: Path) -> None:
    job = ProbeJob(task=task, data_dir=store, device="cpu", layers=[14], draws=1, batch_size=4)
    run, context = new_run(job)
    run_probe(job, run, context)
    assert math.isfinite((run.result_json() or {})["base_loss"])


@pytest.mark.parametrize("task", ROWS)
def test_preview(task: str, store: Path) -> None:
    job = PreviewJob(task=task, data_dir=store, rows=3, dev_examples=4)
    run, context = new_run(job)
    run_preview(job, run, context)
    summary = run.result_json() or {}
    assert summary["rows"] == {"train": 16, "dev": 4, "validation": 6}
    assert len(summary["examples"]) == 3
    for example in summary["examples"]:
        for candidate in example["candidates"]:
            assert candidate["prompt"]
            assert "".join(candidate["scored"]).strip()


@torch.no_grad()
def gold_loss(loaded: LoadedModel, tokens: tuple[int, ...], start: int) -> float:
    """Mean cross entropy of the tokens from ``start`` on, in one plain forward pass."""
    ids = torch.tensor([tokens], device=loaded.device)
    logits = loaded.model(input_ids=ids).logits[0, start - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, start:]))


@pytest.mark.parametrize("path", [ReferenceForward, FastForward])
@pytest.mark.parametrize("task", ["copa", "squad", "drop"])
def test_gold_loss_is_the_mean_over_tokens_then_examples(
    demo: LoadedModel, task: str, path: type[ReferenceForward] | type[FastForward]
) -> None:
    info, forward = TASKS[task], path(demo)
    training = encode_rows(info, ROWS[task], demo.tokenizer, demo.context, training=True)
    wanted = [gold_loss(demo, e.candidates[0].tokens, e.candidates[0].start) for e in training]
    prepared = forward.prepare(training)
    start = shared_start([e.rows for e in training]) * (len(training) - 1)
    most = sum(len(e.rows[0]) for e in training) - start
    held = prepared.input_ids.shape
    assert held == ((1, most) if path is FastForward else (len(training), held[1])), "gold only"
    loss = float(task_loss(forward.logits(prepared), prepared.scored))
    assert loss == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    whole = encode_rows(info, ROWS[task], demo.tokenizer, demo.context)
    result = evaluate(info, demo, forward, whole, 1)
    assert result["loss"] == pytest.approx(loss, rel=1e-4), "the loss of training on those rows"


def test_accuracy_and_f1a_of_a_known_ranking(demo: LoadedModel) -> None:
    info, forward = TASKS["multirc"], FastForward(demo)
    rows = [ROWS["multirc"][i % 2] | {"answer": f"number {i}"} for i in range(7)]
    examples = encode_rows(info, rows, demo.tokenizer, demo.context)
    prepared = forward.prepare(examples)
    best = candidate_scores(forward.logits(prepared), prepared.scored).argmax(-1).tolist()
    result = evaluate(info, demo, forward, examples, 3)
    labels = [row["label"] for row in rows]
    both = sum(b == y == 1 for b, y in zip(best, labels, strict=True))
    assert result["accuracy"] == sum(b == y for b, y in zip(best, labels, strict=True)) / 7
    assert result["f1a"] == pytest.approx(2 * both / (sum(best) + sum(labels)))
