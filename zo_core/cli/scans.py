"""``python -m zo_core verify-known``: scans of known models against what was published."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from zo_core.analysis.known import KNOWN, KnownModel, Published, recognise
from zo_core.cli.launch import CANCELLED, FAILED, follow, launch, refuse
from zo_core.errors import UserError
from zo_core.models.catalog import ModelError, cached_folder, describe
from zo_core.runs import to_json

Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")]
BOS = {"with": "add", "without": "none", "any": "auto"}
"""How a scan is told to treat BOS, by how the published one did."""


@dataclass(frozen=True, slots=True)
class Local:
    """A known model on this machine."""

    known: KnownModel
    model: str
    by: str


def local_models(paths: list[Path]) -> tuple[list[Local], list[str]]:
    """Known models in the given folders or, where none is given, in the hub cache.

    Args:
        paths: model folders, or folders of model folders.

    Returns:
        The known models, and the folders that hold a model that is not known or cannot be read.

    Raises:
        UserError: a path is no folder, or holds no model at all.
    """
    if not paths:
        cached = [
            Local(known, hub_id, "hub id")
            for known in KNOWN
            for hub_id in known.hub_ids
            if cached_folder(hub_id) is not None
        ]
        return cached, []
    found, others = [], []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"paths: {path} is no folder.")
        inside = sorted(p for p in path.iterdir() if (p / "config.json").is_file())
        folders = [path] if (path / "config.json").is_file() else inside
        if not folders:
            raise UserError(f"paths: neither {path} nor a folder in it holds a config.json.")
        for folder in folders:
            try:
                match = recognise(str(folder), describe(str(folder)))
            except ModelError:
                match = None
            if match is None:
                others.append(str(folder))
            else:
                found.append(Local(match.known, str(folder.absolute()), match.by))
    return found, others


def agrees(published: Published, verdicts: dict[str, Any]) -> bool:
    """Whether the rule that the source used names what the source did; none is an answer, too."""
    ours = verdicts[published.rule]
    if published.layer is None:
        return ours["state"] == "none"
    return ours["layer"] == published.layer


def check(local: Local, answer: Published, options: dict[str, Any], json: bool) -> dict[str, Any]:
    """Scan a model as an answer was published, and compare."""
    fields = {"kind": "scan", "model": local.model, "bos": BOS[answer.bos], **options}
    run = launch(fields, json)
    status = follow(run, json)
    row: dict[str, Any] = {"model": local.model, "name": local.known.name, "by": local.by}
    row |= {
        "run_id": run.run_id,
        "state": status.state,
        "published": asdict(answer) | {"sentence": answer.sentence},
    }
    if status.state != "done":
        error = status.error or status.message or f"The scan was {status.state}."
        return row | {"agrees": None, "error": error}
    verdicts = (run.result_json() or {})["verdicts"]
    return row | {
        "ours": verdicts[answer.rule] | {"rule": answer.rule},
        "emergence": verdicts["emergence"]["layer"],
        "agrees": agrees(answer, verdicts),
    }


def verify_known(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="model folders; none given: the hub cache"),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="where")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="of the weights")
    ] = "auto",
    json: Json = False,
) -> None:
    """Scan every known model that is on this machine and compare with what was published.

    Exit code 1 if an answer differs or a scan fails. Nothing is downloaded.
    """
    try:
        found, others = local_models(paths or [])
    except UserError as error:
        refuse(str(error), json)
    for folder in others:
        typer.echo(f"{folder}: not a known model, left out", err=True)
    if not found:
        where = "in the given folders" if paths else "in the hub cache"
        names = ", ".join(known.name for known in KNOWN)
        sentence = f"Nothing was checked: no known model is {where}. Known are {names}."
        typer.echo(sentence, err=json)
    options = {"device": device, "dtype": dtype}
    rows = []
    for local in found:
        for answer in local.known.published:
            row = check(local, answer, options, json)
            rows.append(row)
            typer.echo(_line(row), err=json)
            if row["state"] == "cancelled":  # by Ctrl-C: the others were not wanted either
                break
        else:
            continue
        break
    if json:
        typer.echo(to_json({"checked": rows, "unknown": others}))
    if any(row["state"] == "cancelled" for row in rows):
        raise typer.Exit(CANCELLED)
    if not all(row["agrees"] for row in rows):
        raise typer.Exit(FAILED)


def _line(row: dict[str, Any]) -> str:
    head = f"{row['name']} ({row['model']}), {row['published']['sentence']}"
    if row["agrees"] is None:
        return f"{head}: FAILED: {row['error']}"
    ours = row["ours"]
    named = "none" if ours["layer"] is None else f"layer {ours['layer']}"
    verdict = "agrees" if row["agrees"] else "DIFFERS"
    return f"{head}: {verdict}: {ours['rule']} names {named}. {ours['reason']}"
