"""Run a comparison: keep every worker busy with cells until all are settled.

Each cell is an ordinary run, handed to the engine like any other; at most as many are handed over
at a time as there are workers, so that other jobs need not wait behind a whole comparison.

What happens to a cell:

* done: never run again, whoever resumes the comparison.
* interrupted, or cancelled with the comparison: its run is resumed.
* failed: tried once more as a new run, then left as failed; the others go on. A later ``--resume``
  tries it again.
* diverged: the loss was not finite. It would be again, so this is its result.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any

from zo_core import backend
from zo_core.compare.cells import Cell, Plan, ProfileCell, make_plan
from zo_core.compare.outcomes import DIVERGED, DONE, FAILED, MISSING, Outcome, read_outcome
from zo_core.compare.store import Comparison
from zo_core.errors import UserError

POLL_EVERY = 0.2
HOPELESS = 10
"""Failed runs after which a comparison stops if none has ever been done."""
TRIES = 2
"""Runs a cell gets in one session until it counts as failed."""
INTERRUPTIONS = 6
"""Times its run is begun or resumed in one session: engines end with the app that owns them."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a comparison is."""

    total: int
    done: int
    failed: int
    """Failed for good: another session would try again."""
    diverged: int
    running: int
    seconds: float
    """Since this session began."""
    eta: float | None
    """Seconds that are left, by the pace of this session; None until a cell has finished."""
    message: str


class Driver:
    """One session of working on a comparison."""

    def __init__(self, comparison: Comparison) -> None:
        """Nothing is run yet."""
        self._comparison, self._spec = comparison, comparison.spec
        self._ids = comparison.run_ids()
        self._outcomes: dict[str, Outcome] = {}
        self._begun: Counter[str] = Counter()
        """Times a cell's run was begun or resumed in this session."""
        self._tries: Counter[str] = Counter()
        """Times it then failed, or ended early too often."""
        self._live: dict[str, Cell | ProfileCell] = {}
        self._plan = Plan([], [], [], {}, 0)
        self._began = time.monotonic()
        self._passes = 0.0
        """Steps times their cost, of the cells that finished in this session."""
        self._last = ""
        self._failures = 0
        for key, run_id in self._ids.items():
            self._outcomes[key] = read_outcome(run_id)

    def run(self, show: Callable[[Snapshot], None], stop: Event) -> bool:
        """Work until every cell is settled or someone asks to stop.

        Args:
            show: called a few times a second.
            stop: set to stop: running cells are cancelled, and can be resumed.

        Returns:
            Whether every cell is settled.

        Raises:
            UserError: the engine cannot be used, or nothing works.
        """
        try:
            while not (stop.is_set() or self._comparison.cancel_requested):
                self._plan = make_plan(self._spec, self._known)
                waiting = [cell for cell in self._plan.cells if self._is_due(cell)]
                if not waiting and not self._live:
                    return True
                self._submit(waiting)
                show(self._snapshot())
                self._wait(show, stop)
                self._check_that_any_works()
            return False
        finally:
            self._cancel()
            show(self._snapshot())

    # -- what is known ------------------------------------------------------------------------

    def _known(self, cell: Cell | ProfileCell) -> Outcome | None:
        """A cell's outcome for the plan; a failure that is tried again is not known yet."""
        found = self._outcomes.get(cell.key)
        return None if found is None or self._is_due(cell) else found

    def _is_due(self, cell: Cell | ProfileCell) -> bool:
        if cell.key in self._live:
            return False
        found = self._outcomes.get(cell.key)
        if found is None:
            return True
        if found.state in (DONE, DIVERGED):
            return False
        return self._tries[cell.key] < TRIES

    def _check_that_any_works(self) -> None:
        """Stop early where nothing can succeed, as without an engine or the task's rows.

        Raises:
            UserError: many runs failed and not one was ever done.
        """
        if self._failures >= HOPELESS and not any(o.state == DONE for o in self._outcomes.values()):
            error = next(o.error for o in self._outcomes.values() if o.state == FAILED)
            raise UserError(f"The first {self._failures} runs all failed: {error}")

    # -- running ------------------------------------------------------------------------------

    def _submit(self, waiting: list[Cell | ProfileCell]) -> None:
        room = max(1, len(backend.workers())) - len(self._live)
        for cell in waiting[: max(0, room)]:
            self._begun[cell.key] += 1
            self._ids[cell.key] = self._run_of(cell)
            self._live[cell.key] = cell

    def _run_of(self, cell: Cell | ProfileCell) -> str:
        """The run that fills a cell: one that was stopped goes on, else a new one."""
        if cell.key in self._ids:
            before = read_outcome(self._ids[cell.key])
            # Another engine may still run it for a session that has ended.
            if before.state in ("queued", "running", DONE):
                return before.run_id
            if before.state in ("interrupted", "cancelled") and isinstance(cell, Cell):
                return backend.resume(before.run_id).run_id
        run_id = backend.submit(cell.job(self._spec)).run_id
        try:
            self._comparison.record(cell, run_id)
        except OSError:
            backend.cancel(run_id)  # nobody would know whose it is
            raise
        return run_id

    def _wait(self, show: Callable[[Snapshot], None], stop: Event) -> None:
        """Until a cell has ended, or more workers are there than cells run."""
        while not (stop.wait(POLL_EVERY) or self._comparison.cancel_requested):
            ended = self._look()
            show(self._snapshot())
            if ended or len(backend.workers()) > len(self._live):
                return

    def _look(self) -> bool:
        """Read the running cells; whether one of them has ended."""
        ended = False
        for key, cell in list(self._live.items()):
            found = self._outcomes[key] = read_outcome(self._ids[key])
            if found.state in ("queued", "running"):
                continue
            ended = True
            del self._live[key]
            if found.state == DONE:
                self._passes += self._cost(cell)
            elif found.state == FAILED:
                self._failures += 1
                self._tries[key] += 1
            elif found.state != DIVERGED and self._begun[key] >= INTERRUPTIONS:
                # In this session; on disk it stays resumable.
                self._tries[key] = TRIES
                self._outcomes[key] = Outcome(found.run_id, FAILED, found.error)
            self._last = f"{cell.key}: {self._outcomes[key].state}"
        return ended

    def _cancel(self) -> None:
        """Stop the running cells; what they have done is kept."""
        if not self._live:
            return
        for key in self._live:
            backend.cancel(self._ids[key])
        while self._live:
            self._look()
            time.sleep(POLL_EVERY)

    # -- showing ------------------------------------------------------------------------------

    def records(self) -> dict[str, list[dict[str, Any]]]:
        """Every known cell with its state, and the learning rates that were chosen."""
        plan = self._plan
        return {
            "profiles": [self._record(c) | {"kind": c.kind, "task": c.task} for c in plan.profiles],
            "search": [self._tuning_record(c) for c in plan.search],
            "final": [self._tuning_record(c) for c in plan.final],
            "choices": [
                {
                    "task": task,
                    "arm": arm,
                    "lr": choice.lr,
                    "at_edge": choice.at_edge,
                    "added": choice.added,
                }
                for (task, arm), choice in plan.choices.items()
            ],
        }

    def _tuning_record(self, cell: Cell) -> dict[str, Any]:
        facts = {"task": cell.task, "arm": cell.arm, "lr": cell.lr, "seed": cell.seed}
        found = self._outcomes.get(cell.key)
        values = {"value": found.value, "dev_loss": found.dev_loss} if found else {}
        return self._record(cell) | facts | values

    def _record(self, cell: Cell | ProfileCell) -> dict[str, Any]:
        found = self._outcomes.get(cell.key)
        if cell.key in self._live:
            state = "running"
        elif found is None or found.state == MISSING or self._is_due(cell):
            state = "waiting"
        else:
            state = found.state
        share = found.step / found.total if found and found.total else 0.0
        run_id = self._ids.get(cell.key, "")
        return {"state": state, "share": share, "run_id": run_id, "error": _error(found)}

    def _cost(self, cell: Cell | ProfileCell) -> float:
        """Forward passes; those of a scan or probe do not count."""
        return float(self._spec.budget(cell.searching)) if isinstance(cell, Cell) else 0.0

    def _snapshot(self) -> Snapshot:
        cells = self._plan.cells
        found = {c.key: o for c in cells if (o := self._outcomes.get(c.key)) is not None}
        done = sum(o.state == DONE for o in found.values())
        failed = sum(o.state == FAILED and self._tries[k] >= TRIES for k, o in found.items())
        diverged = sum(o.state == DIVERGED for o in found.values())
        seconds = time.monotonic() - self._began
        eta = None
        if self._passes:
            now = sum(
                self._cost(c) * (o.step / o.total)
                for key, c in self._live.items()
                if (o := self._outcomes.get(key)) is not None and o.total
            )
            unknown = max(0, self._plan.total - len(cells))
            todo = unknown * float(self._spec.budget())
            todo += sum(self._cost(c) for c in cells if self._is_due(c) or c.key in self._live)
            eta = max(0.0, (todo - now) * seconds / (self._passes + now))
        running = len(self._live)
        return Snapshot(self._plan.total, done, failed, diverged, running, seconds, eta, self._last)


def _error(found: Outcome | None) -> str:
    return found.error if found is not None and found.state in (FAILED, DIVERGED) else ""


def run_comparison(
    comparison: Comparison, show: Callable[[Snapshot], None], stop: Event | None = None
) -> bool:
    """Work on a comparison and keep its files up to date; see :meth:`Driver.run`.

    Raises:
        UserError: the engine cannot be used, or another process works on it.
    """
    from zo_core.compare.recorder import Recorder  # pandas and scipy

    backend.start()
    with comparison.working():
        driver = Driver(comparison)
        recorder = Recorder(comparison, driver.records)

        def show_and_record(now: Snapshot) -> None:
            recorder(now)
            show(now)

        try:
            if backend.engine_status()[0] == "failed":
                raise UserError(backend.engine_status()[1])
            finished = driver.run(show_and_record, stop or Event())
        except (UserError, OSError) as error:
            with suppress(OSError):
                recorder.end("failed", str(error))
            raise
        recorder.end("done" if finished else "cancelled")
        return finished
