"""The folder of a comparison: ``cache/comparisons/<id>/``.

``spec.json`` is the comparison, ``command.txt`` what began it, ``cells.jsonl`` says which run
filled which cell (append-only; the last line of a cell holds). What became of a run stays in its
run folder, so a comparison that was interrupted anywhere goes on from what is on disk. The rest is
for readers, replaced while it runs: ``status.json``, ``progress.json`` and the results.
"""

import fcntl
import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zo_core.compare.cells import Cell, ProfileCell
from zo_core.compare.spec import CompareSpec
from zo_core.compare.status import SessionStatus
from zo_core.errors import UserError
from zo_core.runs import Process, replace_file, to_json
from zo_core.settings import settings

RESULTS = (
    *(f"{name}.csv" for name in ("table", "measurements", "search", "layers")),
    *(f"{name}.parquet" for name in ("table", "measurements", "curves")),
    "table.md",
    "table.json",
)
"""Files of results that a comparison's folder holds."""
COMPARISON_ID = re.compile(r"^\d{8}-\d{6}-compare-[0-9a-f]{6}$")


class ComparisonNotFoundError(UserError):
    """No comparison of that id."""


class Comparison:
    """One comparison folder."""

    def __init__(self, path: Path) -> None:
        """Wrap an existing folder; use :func:`create` or :func:`get`."""
        self.path = path
        self.comparison_id = path.name

    @property
    def spec(self) -> CompareSpec:
        """What is compared."""
        return CompareSpec.model_validate_json((self.path / "spec.json").read_text())

    @property
    def created(self) -> float:
        """When it was made, Unix seconds."""
        stamp = datetime.strptime(self.comparison_id[:15], "%Y%m%d-%H%M%S")
        return stamp.replace(tzinfo=UTC).timestamp()

    @property
    def command(self) -> str:
        """The command line that began it."""
        return (self.path / "command.txt").read_text().strip()

    def run_ids(self) -> dict[str, str]:
        """The run that fills each cell, by the cell's key."""
        return dict(self._filled())

    def every_run(self) -> frozenset[str]:
        """Ids of all runs that fill a cell or once did."""
        return frozenset(run_id for _, run_id in self._filled())

    def _filled(self) -> Iterator[tuple[str, str]]:
        with suppress(FileNotFoundError):
            for line in (self.path / "cells.jsonl").read_text().splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a line torn by a crash
                    record = json.loads(line)
                    yield record["cell"], record["run_id"]

    def record(self, cell: Cell | ProfileCell, run_id: str) -> None:
        """Keep which run fills a cell."""
        line = to_json({"cell": cell.key, "run_id": run_id, "time": time.time(), **asdict(cell)})
        with (self.path / "cells.jsonl").open("ab+") as file:
            torn = file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n"
            file.write((("\n" if torn else "") + line + "\n").encode())

    def write(self, name: str, data: bytes | str) -> Path:
        """Write a file of results atomically."""
        replace_file(self.path / name, data)
        return self.path / name

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of this folder, or None while there is none."""
        try:
            found: dict[str, Any] = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None
        return found

    def status(self) -> SessionStatus:
        """How far it is; *interrupted* if no process works on it and none said how it ended."""
        try:
            return SessionStatus.from_json((self.path / "status.json").read_text())
        except (OSError, ValueError, TypeError):
            return SessionStatus()

    def update(self, status: SessionStatus) -> None:
        """Replace ``status.json``."""
        self.write("status.json", to_json(asdict(replace(status, updated=time.time()))))

    def begin(self, process: Process) -> None:
        """A process is about to work on it: earlier requests to stop are not meant for it."""
        (self.path / "cancel").unlink(missing_ok=True)
        self.update(SessionStatus("starting", process=process, started=time.time()))

    def request_cancel(self) -> None:
        """Ask the process that works on it to stop; harmless if none does."""
        (self.path / "cancel").touch()

    @property
    def cancel_requested(self) -> bool:
        """Whether a cancel was asked for."""
        return (self.path / "cancel").exists()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Be the only process that runs its cells.

        Raises:
            UserError: another one does.
        """
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"Comparison {self.comparison_id} is being run by another process: wait until "
                    "that has ended, or stop it first."
                ) from error
            except OSError:
                pass  # a file system without locks: no worse than not asking
            yield


def create(spec: CompareSpec, command: str = "") -> Comparison:
    """Make the folder of a new comparison.

    Args:
        spec: what is compared.
        command: the command line that begins it; none: one that reads ``spec.json``.

    Raises:
        OSError: the folder cannot be written.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = settings().comparisons_dir / f"{stamp}-compare-{secrets.token_hex(3)}"
    path.mkdir(parents=True)
    command = command or "python -m zo_core compare spec.json"
    replace_file(path / "command.txt", command + "\n")
    replace_file(path / "spec.json", spec.model_dump_json(indent=1) + "\n")
    return Comparison(path)


def get(comparison_id: str) -> Comparison:
    """The comparison of that id.

    Raises:
        ComparisonNotFoundError: the id is malformed or unknown.
    """
    path = settings().comparisons_dir / comparison_id
    if not COMPARISON_ID.fullmatch(comparison_id) or not (path / "spec.json").is_file():
        known = [c.comparison_id for c in list_comparisons()][:3]
        there = f"the newest are {', '.join(known)}" if known else "there are none yet"
        raise ComparisonNotFoundError(
            f"No comparison {comparison_id!r} in {settings().comparisons_dir}: {there}."
        )
    return Comparison(path)


def list_comparisons() -> Iterator[Comparison]:
    """All comparisons, newest first."""
    root = settings().comparisons_dir
    names = sorted((p.name for p in root.iterdir()), reverse=True) if root.is_dir() else []
    for name in names:
        if COMPARISON_ID.fullmatch(name) and (root / name / "spec.json").is_file():
            yield Comparison(root / name)
