"""The benchmark of a step, on the bundled model and few rows."""

import pytest
import torch

from zo_core.bench import step as bench
from zo_core.bench.loop import run_loop_bench
from zo_core.bench.step_table import markdown
from zo_core.errors import UserError


def test_three_arms_on_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm runs, the floor counts the right products, and the table says what was measured."""
    monkeypatch.setattr(bench, "BATCH", 4)
    monkeypatch.setattr(bench, "BATCHES", 2)
    monkeypatch.setattr(bench, "ROUNDS", {"cpu": 1})
    lines: list[str] = []
    kept: list[str] = []
    found = bench.run_step_bench(
        *("demo", ["reviews"]),
        device="cpu",
        say=lines.append,
        keep=lambda result: kept.append(markdown(result)),
    )
    (task,) = found["tasks"]
    assert kept == [markdown(found)]
    assert len(lines) == 1
    assert task["padded"] > task["tokens"] > 4
    assert task["speedup"] == task["mezo"]["median"] / task["ours"]["median"]
    assert task["fp8"] is None
    # 256 channels, 704 neurons: 4 and 3 matrices a block; layers 8 to 15, both points.
    blocks = 2 * (4 * 256 * 256 + 3 * 256 * 704) * 8
    head = 2 * 256 * 8192
    places = 4  # one an example
    assert task["flops"] == blocks * round(2 * task["tokens"]) + head * 2 * places
    table = markdown(found)
    assert "| reviews |" in table
    assert "* reviews, ours: " in table
    assert "fp8: " not in table.split("Phases")[1]


def test_what_memory_is_too_short_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tasks are kept, and the table names it; if none fits, a sentence says so."""
    monkeypatch.setattr(bench, "BATCH", 2)
    monkeypatch.setattr(bench, "BATCHES", 1)
    monkeypatch.setattr(bench, "ROUNDS", {"cpu": 1})
    step, fits = bench.PublishedMezo.step, [True]
    kept: list[str] = []

    def refuse(arm: bench.PublishedMezo, batch: object, *rest: object) -> float:
        if not fits[0]:
            raise torch.OutOfMemoryError
        return step(arm, batch, *rest)

    monkeypatch.setattr(bench.PublishedMezo, "step", refuse)
    found = bench.run_step_bench(
        "demo",
        ["sst2", "copa"],
        device="cpu",
        say=lambda line: fits.__setitem__(0, not line.endswith("copa")),
        keep=lambda result: kept.append(markdown(result)),
    )
    assert kept[-1] == markdown(found), "what is kept names it, too"
    assert [t["task"] for t in found["tasks"]] == ["sst2"]
    assert found["short"] == ["copa"]
    assert "Memory was too short for copa." in markdown(found)
    with pytest.raises(UserError, match="demo and the published step need more memory"):
        bench.run_step_bench(
            "demo", ["copa"], device="cpu", say=lambda _line: fits.__setitem__(0, False)
        )


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(UserError, match="shape: 'gpt9' is unknown"):
        bench.run_step_bench("gpt9", ["reviews"], device="cpu")
    with pytest.raises(UserError, match="layer: 99 is out of range: demo has layers 0 to 15"):
        bench.run_step_bench("demo", ["reviews"], layer=99, device="cpu")


@pytest.mark.gpu
def test_the_loop_alone_with_and_without_graphs() -> None:
    """Both are timed, and the kernels of the graphed steps are there."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    found = run_loop_bench("demo", "reviews", None, "layer:3", "float32", rows=64, steps=30)
    assert min(found["launched"], found["graphs"]) > 0
    assert found["kernels"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_loop_without_a_gpu_is_a_sentence() -> None:
    with pytest.raises(UserError, match="CUDA graphs need a GPU"):
        run_loop_bench("demo", "reviews", None, "layer:3", "float32", rows=64, steps=30)
