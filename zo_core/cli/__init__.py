"""The command line: ``python -m zo_core COMMAND``, as ``--help`` lists them.

The same job specs, engine and run store as the app. With ``--json`` the last line of stdout is one
JSON object (keys in README.md); progress goes to stderr. Exit codes: 0 done, 1 failed, 2 bad
input, 130 cancelled.
"""

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from zo_core import backend
from zo_core.bench.main_job import as_dict, run_bench
from zo_core.cli import compare as compare_command
from zo_core.cli import of_run, reports, scans
from zo_core.cli import runs as runs_commands
from zo_core.cli.launch import follow, launch, refuse, report, writable
from zo_core.cli.options import with_job_options
from zo_core.errors import UserError
from zo_core.jobs import explain
from zo_core.runs import to_json
from zo_core.settings import ROOT, settings

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=False,
    help="ZOScope: see which decoder layer dominates zeroth-order fine-tuning, and tune it.",
    epilog="Start here, on the bundled model:  [bold]python -m zo_core scan[/bold]  names the "
    "first outlier layer;  [bold]python -m zo_core tune[/bold]  fine-tunes it;  "
    "[bold]python -m zo_core app[/bold]  opens the web app.",
)
app.add_typer(runs_commands.app, name="runs")
app.command()(of_run.replay)
app.command()(of_run.export)
app.command("compare")(compare_command.compare)
app.command("report")(reports.report)
app.command("verify-known")(scans.verify_known)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")]
Csv = Annotated[
    Path | None, typer.Option("--csv", metavar="PATH", help="also write the table here")
]


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Show the help when no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@with_job_options("scan")
def scan(fields: dict[str, Any], csv: Csv = None, json: Json = False) -> None:
    """Find the first outlier layer: activation statistics of every decoder layer."""
    writable(csv, "--csv", json)
    run = launch(fields, json)
    status = follow(run, json)
    if csv is not None and status.state == "done":
        import pandas as pd

        from zo_core.export import csv_bytes

        csv.write_bytes(csv_bytes(pd.read_parquet(run.result("layers.parquet"))))
    report(run, status, json)


@app.command()
@with_job_options("mechanism")
def mechanism(fields: dict[str, Any], json: Json = False) -> None:
    """Follow a massive activation: who writes and removes it, sinks, what the loss does."""
    run = launch(fields, json)
    report(run, follow(run, json), json)


@app.command()
@with_job_options("probe")
def probe(fields: dict[str, Any], csv: Csv = None, json: Json = False) -> None:
    """Measure how sensitive the loss is to a perturbation of each layer."""
    writable(csv, "--csv", json)
    run = launch(fields, json)
    status = follow(run, json)
    if csv is not None and status.state == "done":
        shutil.copyfile(run.result("draws.csv"), csv)
        shutil.copyfile(run.result("provenance.json"), csv.with_suffix(".provenance.json"))
    report(run, status, json)


Resume = Annotated[
    str | None, typer.Option("--resume", metavar="RUN", help="go on with a stopped run")
]


@app.command()
@with_job_options("tune")
def tune(fields: dict[str, Any], resume: Resume = None, json: Json = False) -> None:
    """Fine-tune a scope (one layer, by default) with a zeroth-order optimizer, or AdamW."""
    run = launch(fields, json, resume)
    report(run, follow(run, json), json)


@app.command()
@with_job_options("preview")
def preview(fields: dict[str, Any], json: Json = False) -> None:
    """Show rows of a task as the model gets them, with the scored tokens marked."""
    run = launch(fields, json)
    report(run, follow(run, json), json)


@app.command()
@with_job_options("load")
def load(fields: dict[str, Any], json: Json = False) -> None:
    """Make a model resident in the running app's worker, so that its jobs start at once."""
    run = launch(fields, json)
    report(run, follow(run, json), json)


@app.command()
def unload(json: Json = False) -> None:
    """Release every model that is resident in the running app's worker."""
    run = launch({"kind": "unload"}, json)
    report(run, follow(run, json), json)


@app.command()
def bench(
    shape: Annotated[
        str | None,
        typer.Option(help="time one step against MeZO: llama2-7b, qwen3-8b or demo"),
    ] = None,
    probe_shape: Annotated[
        str | None,
        typer.Option("--probe", help="time a whole probe: llama2-7b, qwen3-8b or demo"),
    ] = None,
    draws: Annotated[int, typer.Option(help="with --probe: draws of z a layer")] = 8,
    everything: Annotated[
        bool, typer.Option("--everything", help="with --probe: every further analysis, too")
    ] = False,
    tasks: Annotated[str, typer.Option(help="with --shape")] = "copa,sst2,wsc,cb,drop",
    data_dir: Annotated[Path | None, typer.Option(help="rows for their lengths")] = None,
    layer: Annotated[int | None, typer.Option(help="tuned layer; none given: the shape's")] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="auto|float32|bfloat16|float16")] = "auto",
    scan_shape: Annotated[
        str | None, typer.Option("--scan", help="time the scan of such a shape instead")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="with --scan: its checkpoint, written if absent and kept")
    ] = None,
    fp8: Annotated[
        bool, typer.Option(help="with --shape: time an fp8 suffix as well, where the GPU can")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="write the Markdown table here")] = None,
    json: Json = False,
) -> None:
    """Time the main job here, a step (--shape), a probe (--probe) or a scan (--scan) of a shape."""
    if probe_shape is not None:
        if out is not None:
            refuse("--out goes with --shape or --scan: --probe prints its numbers.", json)
        probe_bench(probe_shape, draws, everything, device, dtype, json)
        return
    if scan_shape is not None:
        writable(out, "--out", json)
        scan_bench(scan_shape, folder, device, out, json)
        return
    if shape is not None:
        writable(out, "--out", json)
        step_bench(shape, tasks.split(","), data_dir, layer, device, dtype, fp8, out, json)
        return
    with TemporaryDirectory(prefix="zoscope-bench-") as cache:
        settings().cache_dir = Path(cache)
        try:
            found = run_bench(lambda line: typer.echo(f"... {line}", err=True))
        finally:
            backend.shutdown()
    for m in found:
        verdict = "reached" if m.reached else "MISSED"
        typer.echo(
            f"{m.what:40} {m.value:7.2f} {m.unit:4} target {m.target:g} {m.unit:4} {verdict}"
        )
    if json:
        typer.echo(to_json({"measurements": [as_dict(m) for m in found]}))


def step_bench(
    shape: str,
    tasks: list[str],
    data_dir: Path | None,
    layer: int | None,
    device: str,
    dtype: str,
    fp8: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time one step of every arm, in this process: it needs the device for itself."""
    from zo_core.bench.step import run_step_bench
    from zo_core.bench.step_table import markdown

    def keep(found: dict[str, Any]) -> None:
        if out is not None:
            out.write_text(markdown(found))

    try:
        result = run_step_bench(
            shape,
            tasks,
            data_dir or settings().data_dir,
            layer,
            device,
            dtype,
            lambda line: typer.echo(f"... {line}", err=True),
            fp8,
            keep,
        )
    except (UserError, ValidationError) as error:
        refuse(explain(error) if isinstance(error, ValidationError) else str(error), as_json)
    typer.echo(markdown(result))
    if as_json:
        typer.echo(to_json(result))


def probe_bench(
    shape: str, draws: int, everything: bool, device: str, dtype: str, as_json: bool
) -> None:
    """Time a probe of all layers, in this process: it needs the device for itself."""
    from zo_core.bench.probe import TARGET, run_probe_bench

    def say(line: str) -> None:
        typer.echo(f"... {line}", err=True)

    try:
        found = run_probe_bench(shape, draws, everything, device, dtype, say)
    except (UserError, ValidationError) as error:
        refuse(explain(error) if isinstance(error, ValidationError) else str(error), as_json)
    share = "" if found["utilisation"] is None else f", {found['utilisation']:.0%} of peak"
    typer.echo(
        f"{shape}: {found['layers']} layers x {draws} draws, {found['pairs']} pairs of points in "
        f"{found['seconds']:.1f} s ({found['ms_per_pair']:.1f} ms a pair{share}); weights "
        f"{'restored' if found['restored'] else 'CHANGED'}"
    )
    if shape == "llama2-7b" and draws == 8 and not everything:
        typer.echo(f"target on an H200: {TARGET:g} s")
    if as_json:
        typer.echo(to_json(found))


def scan_bench(
    shape: str, folder: Path | None, device: str, out: Path | None, as_json: bool
) -> None:
    """Time scans of a checkpoint of a shape, in this process: they need the device."""
    from zo_core.bench.scan import markdown, run_scan_bench

    with TemporaryDirectory(prefix="zoscope-bench-") as own:
        try:
            result = run_scan_bench(
                shape,
                folder or Path(own) / "checkpoint",
                device,
                say=lambda line: typer.echo(f"... {line}", err=True),
            )
        except (UserError, ValidationError) as error:
            refuse(explain(error) if isinstance(error, ValidationError) else str(error), as_json)
    table = markdown(result)
    typer.echo(table)
    if out is not None:
        out.write_text(table)
    if as_json:
        typer.echo(to_json(result))


@app.command(name="app")
def web_app(
    port: Annotated[int, typer.Option(help="port on this machine's loopback")] = 8501,
) -> None:
    """Open the web app."""
    os.chdir(ROOT)
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    os.execv(sys.executable, command)  # noqa: S606 - no shell is wanted


def main() -> None:
    """Entry point."""
    try:
        app(prog_name="python -m zo_core")
    finally:
        # Now, not at exit: Dask's callbacks need threads, which a closing interpreter refuses.
        backend.shutdown()
