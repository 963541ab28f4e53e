"""A finished scan in the run store, made without an engine."""

from zo_core import runs
from zo_core.errors import UserError
from zo_core.jobs import ScanJob
from zo_core.progress import JobContext
from zo_core.recipes.scan import run_scan
from zo_core.runs import Process, Run


def finished_scan(**fields: object) -> Run:
    """Scan in this process, and end the run as a worker would."""
    run = runs.create(ScanJob(**{"device": "cpu"} | fields), Process.current())
    run.update(state="running")
    try:
        run_scan(run.job, run, JobContext(run))
    except UserError as error:
        run.update(state="failed", error=str(error))
    else:
        run.update(state="done")
    return run
