"""What a recipe sees of its job: progress, facts, log and cancel. No torch, no Dask."""

import threading
import time
from typing import Any

from zo_core.runs import Run

WRITE_EVERY = 0.5
"""Seconds between two writes of ``status.json``: a page reads it about once a second."""

LOOK_EVERY = 0.02
"""Seconds between two looks for the cancel file: a look costs a round trip on a network disk."""


class Cancelled(Exception):  # noqa: N818 - it is the user's wish, not an error
    """The user asked the job to stop."""


class JobContext:
    """The link from a running recipe to its run folder. Safe to use from several threads."""

    def __init__(self, run: Run) -> None:
        """Start from what the run already knows (a resumed run keeps its details)."""
        self._run = run
        self._details: dict[str, Any] = dict(run.status().details)
        self._pending: dict[str, Any] = {}
        self._written = 0.0
        self._looked = 0.0
        self._lock = threading.Lock()

    def progress(self, step: int, total: int, message: str = "") -> None:
        """Say how far the job is; written at most about twice a second, the last step always."""
        with self._lock:
            self._pending = {"step": step, "total": total, "message": message}
        if step >= total or time.monotonic() - self._written >= WRITE_EVERY:
            self.flush()

    def detail(self, **facts: Any) -> None:
        """Add facts to ``status.details``; readers see them when this returns."""
        with self._lock:
            self._details.update(facts)
            self._run.update(details=dict(self._details))

    def log(self, line: str) -> None:
        """Append a line to the log of the run."""
        self._run.log(line)

    def check_cancelled(self) -> None:
        """Raise if the user asked the job to stop. Cheap enough for every step.

        Raises:
            Cancelled: a cancel was asked for.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        if self._run.cancel_requested:
            raise Cancelled

    def flush(self) -> None:
        """Write progress that was held back, so that the last message before a pause shows."""
        with self._lock:
            if self._pending:
                self._run.update(**self._pending)
                self._pending = {}
                self._written = time.monotonic()

    def take_pending(self) -> dict[str, Any]:
        """Progress not written yet, for the final status."""
        with self._lock:
            pending, self._pending = self._pending, {}
        return pending
