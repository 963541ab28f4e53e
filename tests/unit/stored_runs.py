"""Finished runs in the run store, made without an engine."""

from collections.abc import Callable
from typing import Any

from zo_core import runs
from zo_core.errors import UserError
from zo_core.jobs import MechanismJob, ProbeJob, ScanJob
from zo_core.progress import JobContext
from zo_core.recipes.mechanism import run_mechanism
from zo_core.recipes.probe import run_probe
from zo_core.recipes.scan import run_scan
from zo_core.runs import Process, Run


def finished_scan(**fields: object) -> Run:
    """A scan."""
    return _finished(ScanJob, run_scan, fields)


def finished_mechanism(**fields: object) -> Run:
    """A mechanism run."""
    return _finished(MechanismJob, run_mechanism, fields)


def finished_probe(**fields: object) -> Run:
    """A probe."""
    return _finished(ProbeJob, run_probe, fields)


def _finished(kind: type, recipe: Callable[..., None], fields: dict[str, Any]) -> Run:
    """Work in this process, and end the run as a worker would."""
    run = runs.create(kind(**{"device": "cpu"} | fields), Process.current())
    run.update(state="running")
    try:
        recipe(run.job, run, JobContext(run))
    except UserError as error:
        run.update(state="failed", error=str(error))
    else:
        run.update(state="done")
    return run
