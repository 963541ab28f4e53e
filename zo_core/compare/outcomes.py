"""What became of a cell, read from its run folder."""

from dataclasses import dataclass
from typing import Any

from zo_core import runs
from zo_core.errors import NOT_FINITE

DONE, FAILED, DIVERGED = "done", "failed", "diverged"
MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Outcome:
    """State and result of a cell's run."""

    run_id: str
    state: str
    """A state of the run store, ``diverged`` (failed as the loss was not finite), or ``missing``
    (the run folder is gone)."""
    error: str = ""
    step: int = 0
    total: int = 0
    dominant: int | None = None
    """The layer that the outlier rule named, if the run asked it."""
    summary: dict[str, Any] | None = None
    """``results/summary.json`` of a finished run."""

    @property
    def settled(self) -> bool:
        """Nothing is to be expected of this run any more."""
        return self.state in (DONE, FAILED, DIVERGED)

    @property
    def dev_loss(self) -> float | None:
        """Loss on dev rows at the best step; None if the run failed or held no dev rows out."""
        if self.state != DONE or self.summary is None:
            return None
        return (self.summary.get("dev") or {}).get("loss")

    @property
    def value(self) -> float | None:
        """The task's main metric on validation rows after tuning."""
        if self.state != DONE or self.summary is None:
            return None
        return self.summary["after"].get(self.summary["metric"])


def read_outcome(run_id: str) -> Outcome:
    """The outcome of a run as it is now. A folder that is gone or damaged is *missing*."""
    try:
        run = runs.get(run_id)
        status = run.status()
    except (runs.RunNotFoundError, OSError, ValueError, TypeError, KeyError):
        return Outcome(run_id, MISSING)
    state: str = status.state
    summary = run.result_json() if state == DONE else None
    if state == DONE and summary is None:
        return Outcome(run_id, MISSING)
    if state == FAILED and status.error.startswith(NOT_FINITE):
        state = DIVERGED
    return Outcome(
        run_id,
        state,
        status.error or status.message,
        status.step,
        status.total,
        status.details.get("dominant_layer"),
        summary,
    )
