"""A comparison's session with an engine that is played: what is run, again, and never again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from zo_core import runs
from zo_core.compare import driver, store
from zo_core.compare.driver import Snapshot, run_comparison
from zo_core.compare.results import collect
from zo_core.compare.spec import CompareSpec
from zo_core.compare.store import Comparison
from zo_core.compare.tables import as_dict
from zo_core.errors import NOT_FINITE, UserError
from zo_core.export import json_bytes, parquet_bytes
from zo_core.jobs import TuneJob
from zo_core.runs import Process, Run
from zo_core.settings import settings

GRID = [0.1, 0.2, 0.3]
Script = Callable[[TuneJob, int], str]
"""How a job's n-th run ends: done, failed, diverged, or running until it is cancelled."""


class _Engine:
    """Ends runs as its script says, with a dev loss that is lowest at lr 0.2."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.jobs: list[TuneJob] = []
        self.resumed: list[str] = []

    def start(self, share: bool = False) -> None:
        """Is there already."""

    def engine_status(self) -> tuple[str, str]:
        return "ready", ""

    def workers(self) -> list[Any]:
        return [None, None]

    def submit(self, job: TuneJob) -> Run:
        run = runs.create(job, None)
        self.jobs.append(job)
        self._end(run, self.script(job, self.jobs.count(job)))
        return run

    def resume(self, run_id: str) -> Run:
        self.resumed.append(run_id)
        run = runs.get(run_id)
        self._end(run, "done")
        return run

    def begin_again(self, run_id: str, state: str) -> Run:
        """A resumed run that ends so."""
        self._end(runs.get(run_id), state)
        return runs.get(run_id)

    def cancel(self, run_id: str) -> None:
        runs.get(run_id).update(state="cancelled")

    def _end(self, run: Run, state: str) -> None:
        job = run.job
        if job.kind != "tune" and state == "done":
            self._profile(run)
        elif state == "running":
            run.beat()
            run.update(state="running", step=1, total=job.steps)
        elif state == "done":
            good = 1 - abs(job.lr - 0.2) - 0.01 * job.seed
            summary = {
                "metric": "accuracy",
                "dev": {"metric": "accuracy", "loss": 1 - good, "examples": 10},
                "before": {"accuracy": 0.5, "loss": 1.0},
                "after": {"accuracy": good, "loss": -good},
                "resolved_scope": job.scope,
                "layer": int(job.scope[6:]) if job.scope[6:].isdigit() else None,
                "steps_per_second": 1.0,
                "tuned_parameters": 7,
                "forward_passes": 2 * job.steps,
            }
            run.write_result("summary.json", json.dumps(summary))
            asked = {"dominant_layer": 3} if "auto" in job.scope else {}
            run.update(state="done", details=asked)
        elif state == "interrupted":
            run.update(state="interrupted", step=1, total=job.steps)
        elif state == "diverged":
            run.update(state="failed", error=f"{NOT_FINITE} at step 2: lower lr or eps.")
        else:
            run.update(state="failed", error="The GPU is on fire.")

    def _profile(self, run: Run) -> None:
        """Layer 1 has the first outlier, layer 2 is felt most."""
        layers = pd.DataFrame({"layer": range(-1, 5), "top1": [1.0, 2, 90, 91, 92, 93]})
        if run.job.kind == "probe":
            layers = pd.DataFrame({"layer": range(5), "mean": [1.0, 2, 9, 3, 4], "sd": 0.1})
            layers = layers.assign(se=0.05, n=4, metric="abs_projected_gradient")
        run.write_result("layers.parquet", parquet_bytes(layers.assign(median=1.0)))
        run.write_result("summary.json", json.dumps({"first_outlier_layer": {"emergence": 1}}))
        run.update(state="done")


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], _Engine]:
    """Put an engine with a script in the place of the real one."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    monkeypatch.setattr(driver, "POLL_EVERY", 0.001)

    def begin(script: Script) -> _Engine:
        engine = _Engine(script)
        names = ("start", "engine_status", "workers", "submit", "resume", "cancel")
        monkeypatch.setattr(
            driver, "backend", SimpleNamespace(**{n: getattr(engine, n) for n in names})
        )
        return engine

    return begin


def comparison(**fields: Any) -> Comparison:
    arms = [
        {"name": "shot", "scope": "zero-shot"},
        {"name": "full", "scope": "full", "lr": GRID},
        {"name": "one", "scope": "layer:auto", "lr": 0.2},
    ]
    spec = {"arms": arms, "seeds": [0, 1], "steps": 4, "search_steps": 2, "search_seed": 9}
    return store.create(CompareSpec.model_validate(spec | fields))


def quiet(now: Snapshot) -> None:
    """Show nothing."""


def states(made: Comparison) -> dict[tuple[str, int], str]:
    return {(m.arm, m.seed): m.state for m in collect(made).measurements}


def test_every_cell_is_run_once_with_the_rate_that_dev_chose(play: Any) -> None:
    engine = play(lambda job, n: "done")
    made, seen = comparison(), []
    assert run_comparison(made, seen.append)
    searched = [(j.lr, j.steps) for j in engine.jobs if j.seed == 9]
    assert sorted(searched) == [(lr, 2) for lr in GRID]
    final = [(j.scope, j.lr, j.seed, j.steps) for j in engine.jobs if j.seed != 9]
    assert sorted(final) == sorted(
        (scope, 0.2, seed, 4) for scope in ("full", "layer:auto") for seed in (0, 1)
    )
    assert (seen[-1].total, seen[-1].done, seen[-1].running) == (7, 7, 0)
    results = collect(made)
    assert results.values("full") == pytest.approx([1.0, 0.99])
    assert results.values("shot") == [0.5, 0.5]
    assert results.of("shot")[0].run_id == results.of("full")[0].run_id, "no run of its own"
    assert results.dominant == 3

    again = play(lambda job, n: "failed")
    assert run_comparison(made, quiet)
    assert again.jobs == [], "finished cells are never repeated"


def test_no_dev_loss_no_choice(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation rows never stand in for dev rows."""
    engine = play(lambda job, n: "done")
    real = driver.read_outcome

    def without_dev(run_id: str) -> Any:
        found = real(run_id)
        return replace(found, summary=(found.summary or {}) | {"dev": None})

    monkeypatch.setattr(driver, "read_outcome", without_dev)
    made = comparison()
    assert run_comparison(made, quiet)
    assert {j.scope for j in engine.jobs if j.seed != 9} == {"layer:auto"}


def test_a_failed_cell_is_tried_once_more_and_sinks_nothing(play: Any) -> None:
    engine = play(lambda job, n: "failed" if (job.scope, job.seed) == ("full", 1) else "done")
    made, seen = comparison(), []
    assert run_comparison(made, seen.append)
    assert [j.seed for j in engine.jobs if j.scope == "full" and j.seed != 9].count(1) == 2
    assert states(made)["full", 1] == "failed"
    assert (seen[-1].done, seen[-1].failed, seen[-1].diverged) == (6, 1, 0)
    facts = as_dict(made, collect(made))
    row = next(r for r in facts["arms"] if r["arm"] == "full")
    assert (row["n"], row["missing"]) == (1, 1)
    assert "on fire" in row["note"]
    assert all(c["decision"] == "undecided" for c in facts["claims"])

    later = play(lambda job, n: "done")
    assert run_comparison(made, quiet)
    assert [(j.scope, j.seed) for j in later.jobs] == [("full", 1)], "another session tries again"
    assert states(made)["full", 1] == "done"


def test_a_second_try_that_works(play: Any) -> None:
    engine = play(lambda job, n: "failed" if n == 1 and job.seed == 0 else "done")
    made = comparison()
    assert run_comparison(made, quiet)
    assert set(states(made).values()) == {"done"}
    assert len(engine.jobs) == 7 + 2


def test_divergence_is_a_result(play: Any) -> None:
    """Infinitely bad in the search, not tried again, and no value where it is the final run."""
    engine = play(lambda job, n: "diverged" if job.lr == 0.3 or job.seed == 1 else "done")
    made = comparison()
    assert run_comparison(made, quiet)
    assert len(engine.jobs) == 7
    assert collect(made).choices["reviews", "full"].lr == 0.2
    assert collect(made).choices["reviews", "full"].dev_losses[0.3] is None
    assert states(made)["full", 1] == "diverged"
    assert collect(made).values("full") == [pytest.approx(1.0), None]


def test_stopped_cells_are_cancelled_and_resumed(play: Any) -> None:
    engine = play(lambda job, n: "running" if job.seed == 1 else "done")
    made, stop = comparison(), Event()

    def stop_when_stuck(now: Snapshot) -> None:
        if now.done == 5 and now.running == 2:
            stop.set()

    assert not run_comparison(made, stop_when_stuck, stop)
    assert sorted(states(made).values()).count("cancelled") == 2
    before = len(engine.jobs)
    later = play(lambda job, n: "done")
    assert run_comparison(made, quiet)
    assert (before, later.jobs, len(later.resumed)) == (7, [], 2)
    assert set(states(made).values()) == {"done"}


def test_another_process_can_cancel_and_none_can_join(play: Any) -> None:
    play(lambda job, n: "running")
    made = comparison()

    def from_outside(now: Snapshot) -> None:
        if now.running:
            assert made.status().state == "running"
            with pytest.raises(UserError, match="is being run by another process"):
                run_comparison(made, quiet)
            made.request_cancel()

    assert not run_comparison(made, from_outside)
    assert made.status().state == "cancelled"


def test_where_nothing_works_it_stops_early(play: Any) -> None:
    engine = play(lambda job, n: "failed")
    made = comparison(seeds=list(range(50)))
    with pytest.raises(UserError, match="runs all failed: The GPU is on fire"):
        run_comparison(made, quiet)
    assert len(engine.jobs) < 20


def test_a_deleted_run_is_run_again_and_a_torn_line_is_passed_over(play: Any) -> None:
    play(lambda job, n: "done")
    made = comparison()
    run_comparison(made, quiet)
    runs.get(collect(made).of("full")[0].run_id).delete()
    with (made.path / "cells.jsonl").open("a") as file:
        file.write('{"cell": "reviews/fu')
    later = play(lambda job, n: "done")
    assert run_comparison(made, quiet)
    assert [(j.scope, j.seed) for j in later.jobs] == [("full", 0)]
    assert set(states(made).values()) == {"done"}


def test_tables(play: Any) -> None:
    play(lambda job, n: "done")
    made = comparison(seeds=[0, 1, 2])
    run_comparison(made, quiet)
    assert all((made.path / name).is_file() for name in store.RESULTS)
    facts = json.loads((made.path / "table.json").read_text())
    assert facts == json.loads(json_bytes(as_dict(made, collect(made))))
    assert [r["arm"] for r in facts["arms"]] == ["shot", "full", "one"]
    assert [r["lr"] for r in facts["search"] if r["chosen"]] == [0.2]
    assert {c["key"] for c in facts["claims"]} == {"a", "e"}
    text = (made.path / "table.md").read_text()
    assert "| reviews | full | 0.2 | 3 | 99.00 | 1.00 |" in text
    assert "python -m zo_core compare spec.json" in text
    assert "scipy" in text


def test_scan_and_probe_are_cells_whose_results_stand_beside_the_gains(play: Any) -> None:
    """Numbered layers ask no rule: the scan names the dominant one."""
    engine = play(lambda job, n: "done")
    arms = [{"name": f"layer:{k}", "scope": f"layer:{k}", "lr": 0.1 + 0.02 * k} for k in range(5)]
    made = comparison(arms=arms, baseline="layer:0")
    assert run_comparison(made, quiet)
    assert sorted(j.kind for j in engine.jobs) == ["probe", "scan", *["tune"] * 10]
    facts = made.read_json("table.json")
    assert facts is not None
    assert facts["dominant"] == 1
    assert [row["layer"] for row in facts["activation"]] == list(range(5)), "no embeddings"
    assert [row["mean"] for row in facts["sensitivity"]] == [1, 2, 9, 3, 4]
    found = {(row["a"], row["b"]): row["rho"] for row in facts["correlations"]}
    assert found["outlier", "sensitivity"] == pytest.approx(0.7)  # 1 - 6 (4 + 1 + 1) / (5 * 24)
    assert {c["key"] for c in facts["claims"]} == {"b", "c"}
    assert play(lambda job, n: "failed").jobs == []


def test_what_readers_see_while_it_runs_and_after(play: Any) -> None:
    play(lambda job, n: "running" if job.seed == 1 else "diverged" if job.lr == 0.3 else "done")
    made, stop = comparison(lr_extensions=0), Event()
    live = []

    def look(now: Snapshot) -> None:
        live.append((made.status(), made.read_json("progress.json")))
        if now.done == 4 and now.running == 2:
            stop.set()

    assert not run_comparison(made, look, stop)
    status, progress = live[0]
    assert (status.state, status.total) == ("running", 7)
    assert [c["state"] for c in progress["search"]].count("running") == 2
    assert {c["state"] for c in progress["final"]} == {"waiting"}, "of the arm with one rate"

    status, progress = made.status(), made.read_json("progress.json")
    assert progress is not None
    assert (status.state, status.done, status.failed, status.diverged) == ("cancelled", 4, 0, 1)
    states = {(c["arm"], c["seed"]): c["state"] for c in progress["final"]}
    assert states == {
        ("full", 0): "done",
        ("full", 1): "waiting",
        ("one", 0): "done",
        ("one", 1): "waiting",
    }
    assert [(c["arm"], c["lr"]) for c in progress["choices"]] == [("full", 0.2), ("one", 0.2)]
    made.update(replace(status, state="running"))
    assert made.status().state == "running", "this process lives"
    made.update(replace(status, state="running", process=Process("elsewhere", 1, 0.0)))
    assert made.status().state == "running", "and that one may"
    (made.path / "status.json").unlink()
    assert made.status().state == "interrupted"


def test_an_engine_that_ends_under_it_costs_no_try(play: Any) -> None:
    """Interrupted runs are resumed, more often than failed ones are tried."""
    engine = play(lambda job, n: "interrupted")
    ends = iter(["interrupted", "interrupted", "done"] * 10)
    engine.resume = lambda run_id: (
        engine.resumed.append(run_id) or engine.begin_again(run_id, next(ends))
    )
    play_again = driver.backend
    play_again.resume = engine.resume
    made = comparison(arms=[{"name": "one", "scope": "layer:auto", "lr": 0.2}])
    assert run_comparison(made, quiet)
    assert set(states(made).values()) == {"done"}
    assert len(engine.jobs) == 2
    assert len(engine.resumed) == 6


def test_unknown_ids(play: Any) -> None:
    play(lambda job, n: "done")
    for wrong in ("../x", "20260101-000000-compare-abcdef"):
        with pytest.raises(UserError, match="there are none yet"):
            store.get(wrong)
    made = comparison()
    with pytest.raises(UserError, match=f"the newest are {made.comparison_id}"):
        store.get("x")
    assert store.get(made.comparison_id).spec == made.spec
