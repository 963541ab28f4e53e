"""The report of one model: its newest scan, mechanism run and probe in one HTML file."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from zo_core.errors import UserError
from zo_core.export import Code, Section, html_page
from zo_core.jobs import MechanismJob, ProbeJob, ScanJob, command_line
from zo_core.reports.mechanism import PARTS
from zo_core.reports.run import TITLES, run_sections
from zo_core.reports.stored import newest_done
from zo_core.runs import Run

JOBS: dict[str, type[ScanJob] | type[MechanismJob] | type[ProbeJob]] = {
    "scan": ScanJob,
    "mechanism": MechanismJob,
    "probe": ProbeJob,
}


@dataclass(frozen=True, slots=True)
class ModelRuns:
    """The newest finished run of every kind that a report has; None where there is none."""

    model: str
    revision: str | None
    runs: dict[str, Run | None]

    @classmethod
    def find(cls, model: str, revision: str | None = None) -> "ModelRuns":
        """Look into the run store.

        Args:
            model: as in the job specs; runs in any dtype and on any device are of the same model.
            revision: as in the job specs.

        Raises:
            UserError: no run of this model has finished.
        """
        found = cls(model, revision, {kind: newest_done(kind, model, revision) for kind in TITLES})
        if not any(found.runs.values()):
            commands = ", or ".join(f"`{found.command(kind)}`" for kind in TITLES)
            raise UserError(
                f"model: no scan, mechanism run or probe of {found.name} in this run store has "
                f"finished: run {commands}."
            )
        return found

    @property
    def name(self) -> str:
        """Model and revision."""
        return self.model + (f"@{self.revision}" if self.revision else "")

    def command(self, kind: str) -> str:
        """The command line that makes a run of a kind."""
        return command_line(JOBS[kind](model=self.model, revision=self.revision))


def model_report(found: ModelRuns) -> bytes:
    """All that is known about a model in one HTML file that opens offline."""
    overview = pd.DataFrame([_row(kind, run) for kind, run in found.runs.items()])
    said = "The newest finished run of every kind. Layers are 0-based."
    parts = [_part(found, kind, run) for kind, run in found.runs.items()]
    return html_page(f"Model {found.name}", [Section("", [said, overview]), *parts])


def _part(found: ModelRuns, kind: str, run: Run | None) -> Section:
    """A part of the report; where there is nothing to show, the command that makes it."""
    if run is None:
        said = "Never run to its end on this model. This command does:"
    else:
        try:
            return Section(TITLES[kind], run_sections(run))
        except UserError as error:
            said = f"{error} This command runs it again:"
    return Section(TITLES[kind], [Section("", [said, Code(found.command(kind))])])


def _row(kind: str, run: Run | None) -> dict[str, Any]:
    """A line of the overview."""
    if run is None:
        return {"part": TITLES[kind], "run": "never run"}
    summary, status = run.result_json() or {}, run.status()
    ended = datetime.fromtimestamp(status.finished or status.created, UTC)
    provenance = run.result_json("provenance.json") or {}
    return {
        "part": TITLES[kind],
        "run": run.run_id,
        "ended": f"{ended:%Y-%m-%d %H:%M} UTC",
        "dtype": provenance.get("dtype", summary.get("dtype")),
        "device": provenance.get("device_name", summary.get("device")),
        "found": _found(kind, summary),
    }


def _found(kind: str, summary: dict[str, Any]) -> str:
    """The layer that a run is about, in a few words."""
    if kind == "scan":
        layer = summary.get("first_outlier_layer", {}).get("emergence")
        return "no first outlier layer" if layer is None else f"first outlier layer {layer}"
    if kind == "mechanism":
        writer = summary.get("writer")
        return (
            f"written by the {PARTS[writer['part']]} of layer {writer['layer']}" if writer else ""
        )
    layer = summary.get("most_sensitive_layer")
    return "" if layer is None else f"largest mean |g| at layer {layer}"
