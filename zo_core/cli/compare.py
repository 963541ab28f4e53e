"""``python -m zo_core compare``: run a comparison and print its tables and verdict."""

import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from zo_core.cli.launch import CANCELLED, FAILED, refuse
from zo_core.compare import store
from zo_core.compare.driver import Snapshot, run_comparison
from zo_core.compare.files import make_spec, placed, read_fields
from zo_core.compare.markdown import search_notes
from zo_core.compare.presets import PRESETS
from zo_core.compare.store import RESULTS, Comparison
from zo_core.errors import UserError
from zo_core.runs import to_json

LINE_EVERY = 15.0
"""Seconds between progress lines while no cell ends."""
LISTS = ("tasks", "seeds", "lr_factors")


def compare(
    source: Annotated[
        str | None,
        typer.Argument(metavar="PRESET|FILE.yaml", help=f"{', '.join(PRESETS)}, or a YAML file"),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="a,b", help="tasks")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="seeds")] = None,
    steps: Annotated[str | None, typer.Option(metavar="N", help="budget in zo-sgd steps")] = None,
    forward_passes: Annotated[
        str | None, typer.Option(metavar="N", help="budget in forward passes, instead of steps")
    ] = None,
    search_steps: Annotated[
        str | None, typer.Option(metavar="N", help="steps for each learning rate that is tried")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(metavar="DIR", help="as in tune")] = None,
    model: Annotated[str | None, typer.Option(metavar="TEXT", help="as in tune")] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="as in tune")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="TEXT", help="as in tune")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="any other field of spec or tune job"),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="ID", help="go on with a stopped comparison")
    ] = None,
    cancel: Annotated[
        str | None, typer.Option(metavar="ID", help="stop a comparison that runs elsewhere")
    ] = None,
    report_: Annotated[
        str | None, typer.Option("--report", metavar="ID", help="write its HTML report to --out")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="print one JSON object as the last line")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="also write the tables here; with --report: a file"),
    ] = None,
) -> None:
    """Compare arms over seeds and tasks: which layer should I tune, and how sure are we?"""
    over: dict[str, Any] = {
        "tasks": task,
        "seeds": seeds,
        "steps": steps,
        "forward_passes": forward_passes,
        "search_steps": search_steps,
        "data_dir": data_dir,
        "model": model,
        "device": device,
        "dtype": dtype,
    }
    over = {name: value for name, value in over.items() if value is not None}
    try:
        if cancel is not None or report_ is not None:
            _alone(cancel, report_, out, bool(source or over or set_ or resume), json)
        over |= dict(_assignment(text) for text in set_ or [])
        comparison = _open(source, over, resume)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        refuse(str(error), json)
    except OSError as error:
        refuse(f"{error.filename} cannot be written: {error.strerror}.", json)
    _run(comparison, json, out)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r} is no assignment: write --set batch_size=4.")
    return name.strip().replace("-", "_"), value.strip()


def _open(source: str | None, over: dict[str, Any], resume: str | None) -> Comparison:
    """A new comparison, or the one to go on with.

    Raises:
        UserError: bad input.
        OSError: the folder cannot be written.
    """
    if resume is not None:
        if source or over:
            given = [*([source] if source else []), *over]
            raise UserError(
                f"--resume keeps the comparison's own settings: leave out {', '.join(given)}."
            )
        return store.get(resume)
    if source is None:
        raise UserError(f"Name a preset ({', '.join(PRESETS)}) or a YAML file, or --resume ID.")
    for name in LISTS:
        if name in over:
            over[name] = [part.strip() for part in over[name].split(",") if part.strip()]
    spec = placed(make_spec(read_fields(source, over.get("model"), over.get("revision")), over))
    return store.create(spec, shlex.join(["python", "-m", "zo_core", *sys.argv[1:]]))


def _alone(
    cancel: str | None, report: str | None, out: Path | None, more: bool, as_json: bool
) -> NoReturn:
    """Stop a comparison, or write its report.

    Raises:
        UserError: bad input.
        OSError: the report cannot be written.
    """
    if more or (cancel is not None and (report is not None or out is not None)):
        raise UserError("--cancel ID stands alone, --report ID goes with --out FILE only.")
    if cancel is not None:
        comparison = store.get(cancel)
        comparison.request_cancel()
        answer = {"comparison_id": cancel, "state": comparison.status().state}
        typer.echo(to_json(answer) if as_json else f"Asked {cancel} to stop.")
        raise typer.Exit
    comparison = store.get(report or "")
    if out is None or out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError("--report ID: name a file in a folder that is there, as --out report.html.")
    from zo_core.reports.compare import comparison_report

    out.write_bytes(comparison_report(comparison))
    answer = {"comparison_id": comparison.comparison_id, "out": str(out.absolute())}
    typer.echo(to_json(answer) if as_json else str(out))
    raise typer.Exit


def _run(comparison: Comparison, as_json: bool, out: Path | None) -> None:
    typer.echo(f"comparison {comparison.comparison_id}", err=True)
    error = ""
    finished = False
    with _interruptible() as stop:
        try:
            finished = run_comparison(comparison, _Lines(), stop)
        except UserError as caught:
            error = str(caught)
        except OSError as caught:
            error = f"The comparison's folder cannot be written: {caught}."
    facts = comparison.read_json("table.json") or {"comparison_id": comparison.comparison_id}
    if out is not None:
        for name in RESULTS:
            if (comparison.path / name).is_file():
                shutil.copyfile(comparison.path / name, out / name)
    if not as_json and "arms" in facts:
        _print(facts)
    again = f"Go on with: python -m zo_core compare --resume {comparison.comparison_id}"
    if error:
        typer.echo(f"Failed: {error}", err=True)
    if not finished:
        typer.echo(again, err=True)
    state = "done" if finished else "failed" if error else "cancelled"
    if as_json:
        typer.echo(to_json({**facts, "state": state, **({"error": error} if error else {})}))
    raise typer.Exit(0 if finished else FAILED if error else CANCELLED)


@contextmanager
def _interruptible() -> Iterator[Event]:
    """Ctrl-C sets the event; a second one leaves at once."""
    stop = Event()

    def ask(number: int, frame: object) -> None:
        typer.echo("cancelling the running cells (Ctrl-C again to leave at once)", err=True)
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class _Lines:
    """Progress on stderr: a line when a cell has ended, and now and then."""

    def __init__(self) -> None:
        self._shown: tuple[int, ...] | None = None
        self._at = 0.0

    def __call__(self, now: Snapshot) -> None:
        state = (now.total, now.done, now.failed, now.diverged)
        if state == self._shown and time.monotonic() - self._at < LINE_EVERY:
            return
        self._shown, self._at = state, time.monotonic()
        eta = "" if now.eta is None else f", about {_duration(now.eta)} left"
        failed = f", {now.failed} failed" if now.failed else ""
        failed += f", {now.diverged} diverged" if now.diverged else ""
        last = f"  ({now.message})" if now.message else ""
        typer.echo(
            f"{_duration(now.seconds):>7}  {now.done} of {now.total} cells done, "
            f"{now.running} running{failed}{eta}{last}",
            err=True,
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print(facts: dict[str, Any]) -> None:
    table = Table(title=facts["spec"]["title"] or None, title_justify="left")
    for name in ("task", "arm", "lr"):
        table.add_column(name)
    for name in ("n", "mean", "sd", "difference", "p (Holm)"):
        table.add_column(name, justify="right")
    for row in facts["arms"]:
        numbers = [
            str(row["n"]),
            _points(row["mean"]),
            _points(row["sd"]),
            _points(row["difference"], "+"),
            "" if row["p_holm"] is None else f"{row['p_holm']:.3g}",
        ]
        lr = "" if row["lr"] is None else f"{row['lr']:g}"
        table.add_row(row["task"], row["arm"], lr, *numbers)
    Console().print(table)
    typer.echo(f"mean, sd in points; differences to {facts['baseline']}")
    for claim in facts["claims"]:
        typer.echo(f"{claim['text']}: {claim['sentence']}")
    for row in facts["precision"]:
        typer.echo(f"{row['task']}: {row['what']}: {row['finding']}")
    for sentence in [*search_notes(facts), *filter(None, [facts["power"]])]:
        typer.echo(sentence)
    typer.echo(facts["path"])


def _points(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value:{sign}.2f}"
