"""The metrics of a run, read once: each refresh reads only what was appended since."""

from array import array

import pandas as pd
import streamlit as st

from zo_core.runs import Run

COLUMNS = ("step", "loss", "forward_passes", "seconds")


class Curve:
    """Steps and evaluations of one run, up to a byte offset of its ``metrics.jsonl``."""

    def __init__(self) -> None:
        """Start before the first record."""
        self.offset = 0
        self.columns = {name: array("d") for name in COLUMNS}
        self.evals: dict[int, dict] = {}
        """Validation, by step."""
        self.dev: dict[int, dict] = {}

    def advance(self, run: Run) -> None:
        """Read the records that are new."""
        try:
            shorter = (run.path / "metrics.jsonl").stat().st_size < self.offset
        except OSError:
            shorter = True
        if shorter:  # resumed from a checkpoint: the steps after it were dropped
            self.__init__()
        records, self.offset = run.read_metrics(self.offset)
        for record in records:
            if record.get("kind") == "step":
                self._add(record)
            elif record.get("kind") == "eval":
                found = self.dev if record.get("split") == "dev" else self.evals
                found[record["step"]] = record

    def _add(self, record: dict) -> None:
        steps = self.columns["step"]
        while steps and steps[-1] >= record["step"]:  # the step was run again after a resume
            for column in self.columns.values():
                column.pop()
        for name, column in self.columns.items():
            value = record.get(name)
            column.append(float("nan") if value is None else value)

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.columns["step"])

    @property
    def steps(self) -> pd.DataFrame:
        """Columns step, loss, forward_passes, seconds."""
        return pd.DataFrame(self.columns)

    @property
    def evaluations(self) -> pd.DataFrame:
        """Of validation rows: columns step, loss and the task's metrics; empty before the first."""
        return pd.DataFrame([self.evals[step] for step in sorted(self.evals)])

    @property
    def dev_evaluations(self) -> pd.DataFrame:
        """The same of dev rows."""
        return pd.DataFrame([self.dev[step] for step in sorted(self.dev)])

    @property
    def best_step(self) -> int | None:
        """The step of the smallest dev loss so far, the earlier one of equals."""
        losses = {s: r["loss"] for s, r in self.dev.items() if r.get("loss") is not None}
        return min(losses, key=lambda s: (losses[s], s)) if losses else None

    def speed(self, window: int = 50) -> float | None:
        """Steps a second over the last steps, evaluation left out."""
        n = len(self)
        if n < 2:
            return None
        first = max(0, n - 1 - window)
        seconds = self.columns["seconds"][-1] - self.columns["seconds"][first]
        return (
            (self.columns["step"][-1] - self.columns["step"][first]) / seconds if seconds else None
        )


def curve(run: Run) -> Curve:
    """The up-to-date curve of a run, kept in the session between refreshes."""
    kept = st.session_state.setdefault("curves", {})
    found = kept.setdefault(run.run_id, Curve())
    found.advance(run)
    return found
