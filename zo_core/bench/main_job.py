"""Time the main job on this machine: every number of README's "Speed" table comes from here.

Runs real jobs through the real engine on the bundled model, in a run store of their own that is
removed afterwards, so that a busy history or a resident model cannot flatter the numbers.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from zo_core import backend
from zo_core.jobs import Job, LoadJob, ProbeJob, ScanJob, TuneJob
from zo_core.runs import Run, Status

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number and what it is to reach."""

    what: str
    value: float
    target: float
    unit: str

    @property
    def reached(self) -> bool:
        """Whether the value is within its target."""
        return self.value <= self.target


class BenchError(RuntimeError):
    """A job of the benchmark did not finish."""


def _finish(job: Job) -> tuple[Run, Status]:
    run = backend.submit(job)
    status = backend.wait(run)
    if status.state != "done":
        raise BenchError(f"{job.kind} ended {status.state}: {status.error or status.message}")
    return run, status


def _seconds(status: Status) -> float:
    assert status.started is not None
    assert status.finished is not None
    return status.finished - status.started


def _step_times(run: Run, until: Callable[[int], bool], limit: float = 120.0) -> list[float]:
    """Clock times at which a reader of the live run sees new step records."""
    seen, offset, end = [], 0, time.time() + limit
    while time.time() < end:
        records, offset = run.read_metrics(offset)
        if any(r["kind"] == "step" for r in records):
            seen.append(time.time())
        if until(sum(1 for _ in seen)) or not run.status().live:
            break
        time.sleep(0.1)  # a page reads every second; a busier reader takes time from the worker
    return seen


def run_bench(say: Callable[[str], None] = lambda _line: None) -> list[Measurement]:
    """Measure everything; about two minutes on two CPU cores.

    Args:
        say: receives a line before each measurement.

    Raises:
        BenchError: a job failed.
    """
    say("loading the bundled model")
    _finish(LoadJob())
    found = []

    say("scan")
    _, status = _finish(ScanJob())
    found.append(Measurement("scan, bundled passages", _seconds(status), 5, "s"))

    say("probe, 16 layers x 8 draws")
    _, status = _finish(ProbeJob())
    found.append(Measurement("probe, 16 layers x 8 draws", _seconds(status), 40, "s"))

    say("tune, 200 steps of the dominant layer")
    run = backend.submit(TuneJob(steps=200))
    seen = _step_times(run, lambda _count: False)
    status = backend.wait(run)
    if status.state != "done" or not seen:
        raise BenchError(f"tune ended {status.state}: {status.error or status.message}")
    assert status.started is not None
    gaps = [b - a for a, b in zip(seen, seen[1:], strict=False)]
    found += [
        Measurement("tune, first loss point", seen[0] - status.started, 3, "s"),
        Measurement("tune, longest pause of the curve", max(gaps), 1, "s"),
        Measurement("tune, 200 steps with both evaluations", _seconds(status), 60, "s"),
    ]

    say("cancel")
    run = backend.submit(TuneJob(steps=100_000))
    _step_times(run, lambda count: count >= 5)
    asked = time.time()
    backend.cancel(run.run_id)
    backend.wait(run)
    found.append(Measurement("cancel of a running tune", time.time() - asked, 2, "s"))

    memory = max(worker["worker_memory"] for worker in backend.workers())
    found.append(Measurement("memory of the worker", memory / GIB, 2, "GiB"))
    return found


def as_dict(measurement: Measurement) -> dict[str, object]:
    """A measurement with its verdict, for JSON."""
    return asdict(measurement) | {"reached": measurement.reached}
