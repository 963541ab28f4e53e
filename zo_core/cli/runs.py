"""``python -m zo_core runs``: list, show, cancel, export and delete runs."""

from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.pretty import Pretty

from zo_core import backend, runs
from zo_core.cli.launch import refuse, writable
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


UNREADABLE = (OSError, ValueError, TypeError, KeyError)
"""What reading a run folder raises that a crash, another version or a hand has spoiled."""


class Kind(StrEnum):
    """Kinds of runs that are listed."""

    scan = "scan"
    probe = "probe"
    tune = "tune"


def _row(run: Run) -> dict[str, Any]:
    try:
        status, job = run.status(), run.job
    except UNREADABLE:
        return {"run_id": run.run_id, "kind": run.run_id.split("-")[2], "state": "damaged"}
    text = getattr(job, "text", "task")
    return {
        "run_id": run.run_id,
        "kind": job.kind,
        "state": status.state,
        "model": getattr(job, "model", None),
        "task": getattr(job, "task", None) if text == "task" else text,
        "scope": getattr(job, "scope", None),
        "step": status.step,
        "total": status.total,
        "created": datetime.fromtimestamp(status.created, UTC).isoformat(timespec="seconds"),
    }


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Option(help="only this kind")] = None,
    json: Json = False,
) -> None:
    """All runs, newest first."""
    kinds = tuple(Kind) if kind is None else (kind,)
    rows = [_row(run) for run in runs.list_runs(kinds)]
    if json:
        typer.echo(to_json({"runs": rows}))
        return
    if not rows:
        typer.echo("No runs yet: `python -m zo_core scan` makes one.")
        return
    # Plain columns: ids stay whole at any width, and in a pipe.
    for row in rows:
        steps = f"{row['step']}/{row['total']}" if row.get("total") else ""
        columns = (row["state"], row.get("model"), row.get("task"), row.get("scope"), steps)
        typer.echo("  ".join([row["run_id"], *(str(c) for c in columns if c)]))


@app.command()
def show(run_id: RunId, json: Json = False) -> None:
    """Everything about one run: spec, status, result."""
    run = _find(run_id)
    try:
        facts = {
            "run_id": run.run_id,
            "job": run.job.model_dump(mode="json"),
            "status": asdict(run.status()),
            "result": run.result_json(),
            "path": str(run.path),
        }
    except UNREADABLE as error:
        refuse(f"The folder {run.path} is damaged ({type(error).__name__}).", json)
    if json:
        typer.echo(to_json(facts))
    else:
        Console().print(Pretty(facts))


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
    run = _find(run_id)
    target = out or Path(f"{run_id}.zip")
    writable(target, "--out", as_json=False)
    target.write_bytes(run.zip_bytes())
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
