"""``python -m zo_core report``: one self-contained HTML file about a run or a model."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from zo_core import runs
from zo_core.cli.launch import refuse, writable
from zo_core.errors import UserError
from zo_core.jobs import ScanJob, explain
from zo_core.preflight import absolute
from zo_core.runs import to_json


def report(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="a scan, mechanism run or probe that ended")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="in place of RUN: demo, a hub id or a path"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="with --model: as its runs have it")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="default: RUN.html or MODEL.html, here"),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="print one JSON object as the last line")
    ] = False,
) -> None:
    """Write one self-contained HTML report of a run or, with --model, of all about a model.

    That is the newest finished scan, mechanism run and probe of it; what was never run is named
    with the command that runs it.
    """
    if (run is None) == (model is None):
        refuse("Give either RUN or --model: a report is of a run, or of a model.", json)
    if revision is not None and model is None:
        refuse("--revision goes with --model: a run has its own.", json)
    named = "@".join(filter(None, (model, revision)))
    target = out or Path(
        f"{run or re.sub('[^A-Za-z0-9._@-]+', '-', named).strip('-.') or 'model'}.html"
    )
    writable(target, "--out", json)
    if target.is_dir():
        refuse(f"--out: {target} is a folder: give a file.", json)
    try:
        data, facts = _of_run(run) if run is not None else _of_model(str(model), revision)
        target.write_bytes(data)
    except ValidationError as error:
        refuse(explain(error), json)
    except (UserError, runs.RunNotFoundError) as error:
        refuse(str(error), json)
    except OSError as error:
        refuse(f"--out: {target} cannot be written: {error.strerror}.", json)
    facts |= {"out": str(target), "bytes": len(data)}
    typer.echo(to_json(facts) if json else target)


def _of_run(run_id: str) -> tuple[bytes, dict[str, Any]]:
    from zo_core.reports.run import run_report

    return run_report(runs.get(run_id)), {"run_id": run_id}


def _of_model(model: str, revision: str | None) -> tuple[bytes, dict[str, Any]]:
    from zo_core.reports.model import ModelRuns, model_report

    # As the jobs have it: a valid name, and a folder's whole path.
    job = ScanJob.model_validate(absolute({"model": model, "revision": revision}))
    found = ModelRuns.find(job.model, job.revision)
    ids = {kind: run and run.run_id for kind, run in found.runs.items()}
    return model_report(found), {"model": job.model, "revision": job.revision, "runs": ids}
