"""``python -m zo_core compare`` on the real engine: interrupted half-way and resumed."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.integration.conftest import CommandLine

pytestmark = pytest.mark.timeout(300)
SPEC = """
title: two arms
seeds: [0, 1]
steps: 5
batch_size: 2
train_examples: 16
eval_examples: 8
dev_examples: 8
lr_factors: [1]
evaluations: 1
arms:
  - {name: zero-shot, scope: zero-shot}
  - {name: late, scope: "layer:15"}
  - {name: dominant, scope: "layer:auto", noise: rademacher}
"""


@pytest.fixture
def alone(tmp_path: Path) -> CommandLine:
    """A command line with an engine of its own: one that ends with it."""
    return CommandLine(tmp_path / "cache", {"ZO_WORKERS_PER_DEVICE": "2"})


def cells(command: CommandLine) -> list[dict[str, Any]]:
    """The records of the one comparison there is."""
    (file,) = (command.cache / "comparisons").glob("*/cells.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def done(command: CommandLine) -> set[str]:
    """Runs that are done."""
    # A run's folder is there a moment before its status.
    there = [r for r in map(command.run, command.ids()) if (r.path / "status.json").is_file()]
    return {r.run_id for r in there if r.stored_state() == "done"}


def test_interrupted_half_way_and_resumed_it_repeats_nothing(
    alone: CommandLine, cli: CommandLine, tmp_path: Path
) -> None:
    file, out = tmp_path / "spec.yaml", tmp_path / "out"
    file.write_text(SPEC)
    process = alone.start("compare", file, "--json")
    end = time.monotonic() + 120
    while not done(alone) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    first = alone.end(process).expect(130)
    assert first.json["state"] == "cancelled"
    assert "compare --resume" in first.err
    kept = {i: (alone.run(i).path / "status.json").read_text() for i in done(alone)}
    assert 1 <= len(kept) < 4, "interrupted half-way"

    name = first.json["comparison_id"]
    answer = alone("compare", "--resume", name, "--json", "--out", out).expect(0).json
    assert answer["state"] == "done"
    for run_id, status in kept.items():
        assert (alone.run(run_id).path / "status.json").read_text() == status, "run again"
    records = cells(alone)
    assert len(records) == len({r["cell"] for r in records}) == len(alone.ids()) == 4
    assert {(m["arm"], m["seed"]) for m in answer["cells"] if m["state"] == "done"} == {
        (arm, seed) for arm in ("zero-shot", "late", "dominant") for seed in (0, 1)
    }
    assert answer["dominant"] == 3
    for record in answer["cells"]:
        if record["arm"] != "zero-shot":
            job = alone.run(record["run_id"]).job
            assert (job.steps, record["forward_passes"], job.batch_size) == (5, 10, 2)
            assert job.noise == ("rademacher" if record["arm"] == "dominant" else "gaussian")
    assert len({alone.run(i).status().process.pid for i in alone.ids()}) > 1, "both workers work"

    table = pd.read_csv(out / "table.csv")
    assert list(table["arm"]) == ["zero-shot", "late", "dominant"]
    assert json.loads((out / "table.json").read_text())["arms"] == answer["arms"]
    assert "CPU" in (out / "table.md").read_text() or "NVIDIA" in (out / "table.md").read_text()

    again = alone("compare", "--resume", name, "--json").expect(0).json
    assert again["arms"] == answer["arms"], "the same table"
    assert again["cells"] == answer["cells"]
    assert len(alone.ids()) == 4

    whole = cli("compare", file, "--json").expect(0).json
    compared = ("task", "arm", "n", "mean", "sd", "difference", "p", "note")
    assert [[row[name] for name in compared] for row in whole["arms"]] == [
        [row[name] for name in compared] for row in answer["arms"]
    ], "the table of one that nobody interrupted"
    losses = [[cell["loss"] for cell in one["cells"] if cell["loss"]] for one in (whole, answer)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4), "threads differ"

    report = tmp_path / "report.html"
    alone("compare", "--report", name, "--out", report).expect(0)
    page = report.read_text()
    assert f"Comparison {name}, done. 4 of 4 cells done" in page
    assert "Plotly.newPlot" in page
    assert '"state":"done"' in alone("compare", "--cancel", name, "--json").expect(0).out.replace(
        ": ", ":"
    )
