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
from dataclasses import dataclass
from threading import Event

from zo_core import backend
from zo_core.compare.cells import Cell, Plan, make_plan
from zo_core.compare.outcomes import DIVERGED, DONE, FAILED, Outcome, read_outcome
from zo_core.compare.store import Comparison
from zo_core.errors import UserError

POLL_EVERY = 0.2
HOPELESS = 10
"""Failed runs after which a comparison stops if none has ever been done."""
TRIES = 2
"""Runs a cell gets until it counts as failed, in one session."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a comparison is."""

    total: int
    done: int
    failed: int
    """Failed for good, or diverged."""
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
        self._tries: Counter[str] = Counter()
        self._live: dict[str, Cell] = {}
        self._plan = Plan([], {}, 0)
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
            UserError: another process works on the comparison, or the engine cannot be used.
        """
        with self._comparison.working():
            (self._comparison.path / "cancel").unlink(missing_ok=True)
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

    def _known(self, cell: Cell) -> Outcome | None:
        """A cell's outcome for the plan; a failure that is tried again is not known yet."""
        found = self._outcomes.get(cell.key)
        if found is None or (found.state == FAILED and self._tries[cell.key] < TRIES):
            return None
        return found

    def _is_due(self, cell: Cell) -> bool:
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

    def _submit(self, waiting: list[Cell]) -> None:
        room = max(1, len(backend.workers())) - len(self._live)
        for cell in waiting[: max(0, room)]:
            self._tries[cell.key] += 1
            self._ids[cell.key] = self._run_of(cell)
            self._live[cell.key] = cell

    def _run_of(self, cell: Cell) -> str:
        """The run that fills a cell: one that was stopped goes on, else a new one."""
        if cell.key in self._ids:
            before = read_outcome(self._ids[cell.key])
            # Another engine may still run it for a session that has ended.
            if before.state in ("queued", "running", DONE):
                return before.run_id
            if before.state in ("interrupted", "cancelled"):
                return backend.resume(before.run_id).run_id
        run_id = backend.submit(cell.job(self._spec)).run_id
        self._comparison.record(cell, run_id)
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
            else:
                self._failures += found.state == FAILED
            if found.state not in (DONE, DIVERGED) and self._tries[key] >= TRIES:
                # In this session; on disk it stays resumable, or is tried anew.
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

    def _cost(self, cell: Cell) -> float:
        return float(self._spec.budget(cell.searching))

    def _snapshot(self) -> Snapshot:
        states = [self._outcomes[c.key] for c in self._plan.cells if c.key in self._outcomes]
        done = sum(o.state == DONE for o in states)
        given_up = sum(
            o.state == DIVERGED or (o.state == FAILED and self._tries[c.key] >= TRIES)
            for c in self._plan.cells
            if (o := self._outcomes.get(c.key)) is not None
        )
        seconds = time.monotonic() - self._began
        left = max(0, self._plan.total - done - given_up)
        eta = None
        if self._passes:
            now = sum(
                self._cost(c) * (o.step / o.total)
                for key, c in self._live.items()
                if (o := self._outcomes.get(key)) is not None and o.total
            )
            todo = left * float(self._spec.budget()) - now
            eta = max(0.0, todo * seconds / (self._passes + now))
        return Snapshot(self._plan.total, done, given_up, len(self._live), seconds, eta, self._last)


def run_comparison(
    comparison: Comparison, show: Callable[[Snapshot], None], stop: Event | None = None
) -> bool:
    """Work on a comparison; see :meth:`Driver.run`.

    Raises:
        UserError: the engine cannot be used, or another process works on it.
    """
    backend.start()
    if backend.engine_status()[0] == "failed":
        raise UserError(backend.engine_status()[1])
    return Driver(comparison).run(show, stop or Event())
