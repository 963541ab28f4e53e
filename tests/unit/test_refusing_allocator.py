"""The way down when memory is short, with the allocator of a real GPU."""

import gc
from typing import Any

import pytest
import torch

from zo_core.errors import MemoryExhaustedError
from zo_core.jobs import ModelFields, TuneJob
from zo_core.models.load import load
from zo_core.tasks.data import load_task
from zo_core.tasks.templates import encode
from zo_core.zo.forward import FastForward
from zo_core.zo.out_of_memory import MemoryLadder
from zo_core.zo.scope import TunedScope, scope_parameters
from zo_core.zo.trainer import Progress, make_optimizer, train


@pytest.mark.gpu
def test_a_real_allocator_that_refuses() -> None:
    """With ever less memory a run goes down the ladder, graphs too, and its ledger stays the same.

    Shrinking the allowance between steps also meets captures: every bucket is new at first.
    """
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    demo = load(ModelFields(device="cuda", dtype="bfloat16"))
    data = load_task("reviews")
    rows = [encode(data.task, row, demo.tokenizer, demo.context) for row in data.train[:256]]
    job = TuneJob(scope="layer:3", steps=40, batch_size=64, lr=1e-5)
    total = torch.cuda.get_device_properties(0).total_memory

    said: list[str] = []

    def tuned(megabytes: int | None) -> list[dict[str, Any]]:
        forward = FastForward(demo, 3, graphs=True)
        forward.register(rows)
        ladder = MemoryLadder(forward, [rows], job.batch_size, lambda line, _n: said.append(line))
        ledger: list[dict[str, Any]] = []
        scope = TunedScope(scope_parameters(demo, 3))
        optimizer, progress = make_optimizer(job), Progress()

        def steps() -> None:
            train(
                *(job, demo, forward, scope, optimizer, rows, progress, ledger.append),
                micro_batch=ladder.micro_batch,
            )

        def again() -> None:
            scope.load(scope.base)
            progress.step = progress.forward_passes = 0
            ledger.clear()

        gc.collect()  # the pools of the last run's graphs would be room that nobody counts
        torch.cuda.empty_cache()
        if megabytes is not None:
            room = torch.cuda.memory_reserved() + megabytes * 2**20
            torch.cuda.set_per_process_memory_fraction(room / total)
        try:
            ladder.hold(steps, lambda: f"at step {progress.step + 1}", again)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            scope.close()
        return ledger

    free = tuned(None)
    assert not said
    for megabytes in (1024, 512, 256, 192, 128, 96, 80, 64, 48, 32, 16, 8):
        try:
            tight = tuned(megabytes)
        except MemoryExhaustedError:
            break
        assert [r["step"] for r in tight] == [r["step"] for r in free]
        for ours, theirs in zip(tight, free, strict=True):
            assert ours["forward_passes"] == theirs["forward_passes"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-2)
    met = {line.partition(": ")[2] for line in said}
    assert "CUDA graphs given up" in met
    assert any("micro-batches" in line for line in met)
