"""The report of one run: one HTML file that opens offline."""

from collections.abc import Mapping

from zo_core.errors import UserError
from zo_core.export import Section, html_page
from zo_core.jobs import MechanismJob, ProbeJob, ScanJob
from zo_core.reports.mechanism import mechanism_sections
from zo_core.reports.probe import probe_sections
from zo_core.reports.scan import scan_sections
from zo_core.runs import Run

Parameters = Mapping[str, Mapping[str, float]]
TITLES = {"scan": "Activation scan", "mechanism": "Mechanism", "probe": "Sensitivity"}
"""The kinds of runs that have a report."""


def run_sections(run: Run, parameters: Parameters | None = None) -> list[Section]:
    """What there is to say about a run; the first paragraph is what it found.

    Args:
        run: a scan, a mechanism run or a probe that has ended.
        parameters: thresholds of outlier rules that replace the defaults, for a scan.

    Raises:
        UserError: the run is of another kind, is still going on, or its tables cannot be read.
    """
    job = run.job
    if isinstance(job, ScanJob):
        return scan_sections(run, parameters)
    if isinstance(job, MechanismJob):
        return mechanism_sections(run)
    if isinstance(job, ProbeJob):
        return probe_sections(run, job)
    raise UserError(
        f"run: {run.run_id} is of kind {job.kind}, which has no report: choose one of kind "
        f"{', '.join(TITLES)}."
    )


def run_report(run: Run, parameters: Parameters | None = None) -> bytes:
    """Everything about one run in one HTML file; arguments and errors as :func:`run_sections`."""
    sections, job = run_sections(run, parameters), run.job
    return html_page(f"{TITLES[job.kind]} of {getattr(job, 'model', '')}", sections)
