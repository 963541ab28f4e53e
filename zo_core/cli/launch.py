"""Launch a job from the command line, follow it, and report how it ended."""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from zo_core import backend, runs
from zo_core.errors import UserError
from zo_core.jobs import JOB, explain
from zo_core.preflight import absolute, check
from zo_core.runs import Run, Status, to_json
from zo_core.tasks.catalog import METRIC_NAMES

FAILED, BAD_INPUT, CANCELLED = 1, 2, 130


def launch(fields: dict[str, Any], as_json: bool, resume: str | None = None) -> Run:
    """Validate and queue a job, or queue a stopped one again; exits with 2 on bad input."""
    try:
        if resume is not None:
            extra = [f"--{name.replace('_', '-')}" for name in fields if name != "kind"]
            if extra:
                refuse(
                    f"--resume keeps the run's own settings: leave out {', '.join(extra)}.", as_json
                )
            return backend.resume(resume)
        job = JOB.validate_python(absolute(fields))
        check(job)
        return backend.submit(job)
    except ValidationError as error:
        refuse(explain(error), as_json)
    except (UserError, runs.RunNotFoundError) as error:
        refuse(str(error), as_json)


def writable(path: Path | None, option: str, as_json: bool) -> None:
    """Exit with 2 if a file that an option names could not be written."""
    if path is not None and not path.absolute().parent.is_dir():
        refuse(f"{option}: the folder {path.absolute().parent} does not exist.", as_json)


def refuse(sentence: str, as_json: bool) -> NoReturn:
    """Say what is wrong with the input and exit with 2."""
    typer.echo(f"Error: {sentence}", err=True)
    if as_json:
        typer.echo(to_json({"error": sentence}))
    raise typer.Exit(BAD_INPUT)


def follow(run: Run, as_json: bool) -> Status:
    """Show progress on stderr until the run ends; Ctrl-C cancels it."""
    console = Console(stderr=True)
    backend.start()
    if not as_json:
        console.print(f"[dim]run {run.run_id}[/dim]")
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bars:
        bar = bars.add_task("starting the engine", total=None)

        def show(status: Status) -> None:
            text = status.message or ("queued" if status.state == "queued" else "starting")
            bars.update(bar, description=text, completed=status.step, total=status.total or None)

        try:
            return backend.wait(run, show)
        except KeyboardInterrupt:
            backend.cancel(run.run_id)
            bars.update(bar, description="cancelling (Ctrl-C again to leave at once)")
            return backend.wait(run)


def report(run: Run, status: Status, as_json: bool) -> None:
    """Print the result and exit with the code of the outcome."""
    summary = run.result_json() or {}
    if status.state == "done":
        differs = run.job.kind == "replay" and not summary["identical"]
        if as_json:
            typer.echo(to_json({"run_id": run.run_id, **summary}))
        else:
            _print_summary(run, summary)
        raise typer.Exit(FAILED if differs else 0)
    sentence = status.error or status.message or f"The run was {status.state}."
    typer.echo(f"{status.state.capitalize()}: {sentence}", err=True)
    if run.job.kind == "tune" and status.step:
        typer.echo(f"Go on with: python -m zo_core tune --resume {run.run_id}", err=True)
    if as_json:
        typer.echo(to_json({"run_id": run.run_id, "state": status.state, "error": sentence}))
    raise typer.Exit(CANCELLED if status.state == "cancelled" else FAILED)


def _print_summary(run: Run, summary: dict[str, Any]) -> None:
    """The result in words; the tables are in the run folder."""
    kind = run.job.kind
    if kind == "scan":
        for rule, verdict in summary["verdicts"].items():
            layer = verdict["layer"]
            typer.echo(
                f"{rule:12} {'none' if layer is None else f'layer {layer}':9} {verdict['reason']}"
            )
        typer.echo(summary["consensus"])
        for answer in (summary["published"] or {}).get("answers", []):
            typer.echo(f"{summary['published']['name']}, {answer['sentence']}")
    elif kind == "mechanism":
        _print_mechanism(summary)
    elif kind == "probe":
        typer.echo(f"Most sensitive layer: {summary['most_sensitive_layer']} (mean |g|)")
        if "recommended_eps" in summary:
            eps = summary["recommended_eps"]
            found = "none" if eps is None else f"{eps:g}"
            typer.echo(f"Recommended eps: {found} ({summary['recommended_eps_reason']})")
        for scaling, layer in summary.get("most_sensitive_scaled", {}).items():
            typer.echo(f"Largest loss shift, scaling {scaling}: layer {layer}")
        sys.stdout.write(run.result("layers.csv").read_text())
    elif kind == "preview":
        _print_preview(summary)
    elif kind == "tune":
        before, after, metric = summary["before"], summary["after"], summary["metric"]
        typer.echo(
            f"{summary['resolved_scope']} ({summary['tuned_parameters']} parameters)  "
            f"{METRIC_NAMES[metric]} {before[metric]:.4f} -> {after[metric]:.4f}  "
            f"loss {before['loss']:.4f} -> {after['loss']:.4f}  "
            f"{summary['steps_per_second']:.2f} steps/s, {summary['forward_passes']} forward passes"
        )
        if summary["best_step"] is not None:
            early = ", stopped early" if summary["stopped_early_at"] is not None else ""
            typer.echo(
                f"best dev loss {summary['dev']['loss']:.4f} at step {summary['best_step']} of "
                f"{summary['steps']}{early}; the {summary['kept']} weights are kept"
            )
        cut = sum(summary["truncated"].values())
        if cut:
            typer.echo(f"{cut} rows were longer than the model's context: cut on the left")
    elif kind == "replay":
        verdict = "bit for bit the checkpoint" if summary["identical"] else "NOT the checkpoint"
        largest = summary["max_difference"]
        typer.echo(
            f"{summary['run_id']}: {summary['steps']} steps replayed on {summary['device']}, "
            f"{verdict}" + ("" if largest is None else f" (largest difference {largest:g})")
        )
        if "out" in summary:
            typer.echo(summary["out"])
            return
    elif kind == "export":
        which = "best on the dev rows" if summary["weights"] == "best" else summary["state"]
        typer.echo(
            f"{summary['run_id']}: {summary['form']} of step {summary['step']} of "
            f"{summary['steps']} ({which}), {summary['bytes'] / 1e6:.3g} MB"
        )
        typer.echo(summary["out"])
        return
    typer.echo(f"{run.path}")


def _print_mechanism(summary: dict[str, Any]) -> None:
    """Who writes and removes it, and what the loss does without it."""
    layer = summary["first_outlier_layer"]
    typer.echo(
        f"{summary['rule']}: {'none' if layer is None else f'layer {layer}'}. {summary['reason']}"
    )
    for role, does in (("writer", "written by"), ("remover", "removed by")):
        part = summary[role]
        what = "no single part" if part is None else f"the {part['part']} of layer {part['layer']}"
        value = "" if part is None else f" ({part['value']:+.4g})"
        typer.echo(f"channel {summary['channels'][0]} {does} {what}{value}")
    if summary["sink_share"] is not None:
        typer.echo(f"largest attention-sink share of a head: {summary['sink_share']:.1%}")
    for name, worst in summary["loss_change"].items():
        typer.echo(f"{name:8} loss {worst['change']:+.4f} nats at most, at layer {worst['layer']}")


def _print_preview(summary: dict[str, Any]) -> None:
    """The rendered rows: scored tokens between bars, the right option marked with a star."""
    for number, example in enumerate(summary["examples"], 1):
        cut = ", cut on the left" if example["truncated"] else ""
        typer.echo(f"--- row {number} of {len(summary['examples'])}{cut}")
        typer.echo(example["candidates"][0]["prompt"])
        for index, candidate in enumerate(example["candidates"]):
            star = "*" if index == example["label"] else " "
            pieces = "|".join(json.dumps(p, ensure_ascii=False)[1:-1] for p in candidate["scored"])
            typer.echo(f"{star} |{pieces}|  ({candidate['tokens']} tokens in all)")
        if len(example["references"]) > 1:
            typer.echo(f"  right answers: {'; '.join(example['references'])}")
    rows = ", ".join(f"{count} {split}" for split, count in summary["rows"].items())
    typer.echo(f"{summary['task']}: {rows} rows; * is the right option, | | holds a scored token")
