"""``python -m zo_core runs``: list, show, cancel, export and delete runs."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from zo_core import backend, runs
from zo_core.runs import Run, to_json

app = typer.Typer(help="List, show, cancel, export and delete runs.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="a run id from `runs list`")]
NOT_FOUND = 2


def _find(run_id: str) -> Run:
    try:
        return runs.get(run_id)
    except runs.RunNotFoundError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(NOT_FOUND) from error


def _row(run: Run) -> dict[str, Any]:
    status, job = run.status(), run.job
    return {
        "run_id": run.run_id,
        "kind": job.kind,
        "state": status.state,
        "model": getattr(job, "model", None),
        "task": getattr(job, "task", None),
        "scope": getattr(job, "scope", None),
        "step": status.step,
        "total": status.total,
        "created": datetime.fromtimestamp(status.created, UTC).isoformat(timespec="seconds"),
    }


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Option(help="scan, probe or tune")] = None,
    json: Json = False,
) -> None:
    """All runs, newest first."""
    kinds = ("scan", "probe", "tune") if kind is None else (kind,)
    rows = [_row(run) for run in runs.list_runs(kinds)]
    if json:
        typer.echo(to_json({"runs": rows}))
        return
    if not rows:
        typer.echo("No runs yet: `python -m zo_core scan` makes one.")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("" if v is None else str(v) for v in row.values()))
    Console().print(table)


@app.command()
def show(run_id: RunId, json: Json = False) -> None:
    """Everything about one run: spec, status, result."""
    run = _find(run_id)
    facts = {
        "run_id": run.run_id,
        "job": run.job.model_dump(mode="json"),
        "status": asdict(run.status()),
        "result": run.result_json(),
        "path": str(run.path),
    }
    if json:
        typer.echo(to_json(facts))
    else:
        Console().print(facts)


@app.command()
def cancel(run_id: RunId) -> None:
    """Ask a queued or running run to stop."""
    backend.cancel(_find(run_id).run_id)
    typer.echo(f"Cancel requested for {run_id}.")


@app.command()
def export(
    run_id: RunId,
    out: Annotated[Path | None, typer.Option(metavar="PATH", help="default: RUN.zip here")] = None,
) -> None:
    """Write the run's folder as a zip archive."""
    target = out or Path(f"{run_id}.zip")
    target.write_bytes(_find(run_id).zip_bytes())
    typer.echo(str(target))


@app.command()
def delete(
    run_id: RunId,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Delete a run that has ended."""
    run = _find(run_id)
    if not yes:
        typer.confirm(f"Delete {run_id} and everything in it?", abort=True)
    try:
        run.delete()
    except RuntimeError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
