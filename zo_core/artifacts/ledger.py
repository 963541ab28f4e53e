"""A run's ledger as one compact file: gzip, one JSON object a line.

The first line says whose ledger it is: the facts of every export, and ``digest``, the SHA-256 of
the tuned tensors that base weights and ledger rebuild (:func:`zo_core.artifacts.raw.digest`). Every
further line is a step: ``step``, ``g``, ``lr``, and ``accepted`` and ``micro_batches`` where they
matter.
"""

import gzip
import io
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zo_core.artifacts.raw import digest
from zo_core.artifacts.source import Source, facts
from zo_core.errors import UserError
from zo_core.jobs import JOB, TuneJob
from zo_core.runs import to_json

FORMAT = "zoscope-ledger"
KEPT = ("step", "g", "lr", "accepted", "micro_batches")
LONGEST_LINE = 1 << 24
"""Bytes: the tensors' names in the first line, or g of many directions."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a ledger file holds."""

    facts: dict[str, Any]
    job: TuneJob
    records: list[dict[str, Any]]


def step_records(source: Source) -> list[dict[str, Any]]:
    """The steps of a run's ledger up to its exported weights.

    Raises:
        UserError: some are missing.
    """
    records = [r for r in source.run.read_metrics()[0] if r["kind"] == "step"][: source.step]
    if [r["step"] for r in records] != list(range(1, source.step + 1)):
        raise UserError(f"run: the ledger of {source.run.run_id} has a gap: choose form tensors.")
    return records


def write_ledger(source: Source, stream: BinaryIO) -> dict[str, Any]:
    """Write the ledger up to the exported step; gives its first line.

    Raises:
        UserError: the run's ledger has a gap.
    """
    records = step_records(source)
    with source.path.open("rb") as file:
        head = facts(source, "ledger") | {"digest": digest(file, source.tensors)}
    # No time stamp: the same ledger is the same file.
    with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as packed:
        packed.write(f"{to_json(head)}\n".encode())
        for record in records:
            kept = {name: record[name] for name in KEPT if name in record}
            packed.write(f"{to_json(kept)}\n".encode())
    return head


def ledger_bytes(source: Source) -> bytes:
    """The file, for a download."""
    buffer = io.BytesIO()
    write_ledger(source, buffer)
    return buffer.getvalue()


def read_ledger(path: Path) -> Ledger:
    """Read a ledger file.

    Raises:
        UserError: it cannot be read, or is no whole ledger.
    """
    try:
        with gzip.open(path, "rb") as stream:
            head = _line(stream)
            if head is None or head["format"] != FORMAT or head["version"] != 1:
                raise ValueError("its first line is of another kind")
            job = JOB.validate_python(head["job"])
            records: list[dict[str, Any]] = []
            while (record := _line(stream)) is not None:
                _check(record, len(records) + 1, getattr(job, "directions", 0))
                records.append(record)
    except FileNotFoundError as error:
        raise UserError(f"ledger: there is no file {path}: give an exported ledger.") from error
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"ledger: {path} is no whole ledger of ZOScope ({reason}): export it again, with "
            "form ledger."
        ) from error
    if not isinstance(job, TuneJob) or len(records) != head["step"] or not records:
        raise UserError(f"ledger: {path} is not whole: export it again, with form ledger.")
    return Ledger(head, job, records)


def is_ledger(path: Path) -> bool:
    """Whether a file begins as a ledger does."""
    try:
        with gzip.open(path, "rb") as stream:
            head = _line(stream)
        return head is not None and head.get("format") == FORMAT
    except (OSError, EOFError, zlib.error, ValueError):
        return False


def _line(stream: gzip.GzipFile) -> dict[str, Any] | None:
    line = stream.readline(LONGEST_LINE)
    if not line:
        return None
    if not line.endswith(b"\n"):
        raise ValueError("a line is torn")
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("a line is no JSON object")
    return value


def _check(record: dict[str, Any], step: int, directions: int) -> None:
    numbers = [record["lr"], *record["g"]]
    if (
        record["step"] != step
        or len(record["g"]) != directions
        or not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers)
    ):
        raise ValueError(f"step {step} is not as it should be")
