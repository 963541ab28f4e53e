"""``python -m zo_core replay`` and ``export``: what comes after a tuning run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from zo_core.artifacts.source import NAMES
from zo_core.cli.launch import follow, launch, report
from zo_core.run_jobs import ExportJob, ReplayJob

Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="where")]


def _help(job: type[ReplayJob] | type[ExportJob], name: str) -> str:
    return job.model_fields[name].description or ""


def replay(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help=_help(ReplayJob, "run"))] = None,
    ledger: Annotated[
        Path | None, typer.Option(metavar="FILE", help=_help(ReplayJob, "ledger"))
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help=_help(ReplayJob, "out"))] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help=_help(ReplayJob, "model"))
    ] = None,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help=_help(ReplayJob, "force"))] = False,
    json: Json = False,
) -> None:
    """Rebuild weights from a ledger; exit code 1 if they are not those that were tuned.

    RUN is compared with its checkpoint. A file that `export --form ledger` made (--ledger) is
    rebuilt into the safetensors file --out, also on another machine.
    """
    fields: dict[str, Any] = {"run": run, "ledger": ledger, "out": out, "model": model}
    given = {name: value for name, value in fields.items() if value is not None}
    again = launch({"kind": "replay", **given, "device": device, "force": force}, json)
    report(again, follow(again, json), json)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help=_help(ExportJob, "run"))],
    form: Annotated[
        str, typer.Option(metavar="|".join(NAMES), help=_help(ExportJob, "form"))
    ] = "tensors",
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="file or folder; default: named by RUN, here"),
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="kept|best|last", help=_help(ExportJob, "weights"))
    ] = "kept",
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help=_help(ExportJob, "force"))] = False,
    json: Json = False,
) -> None:
    """Write a run's tuned tensors, whole model, LoRA adapter or ledger for other programs.

    A run that was interrupted or cancelled is exported at its checkpoint.
    """
    fields = {
        "kind": "export",
        "run": run,
        "form": form,
        "out": out or Path(f"{run}{NAMES.get(form, '')}"),
        "weights": weights,
        "device": device,
        "force": force,
    }
    again = launch(fields, json)
    report(again, follow(again, json), json)
