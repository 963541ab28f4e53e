"""The run store: one folder a run, and the folder is the truth.

``cache/runs/<run_id>/`` holds::

    job.json            the job spec
    status.json         state, progress, message (replaced atomically)
    heartbeat           touched every second while the job runs
    cancel              present once a cancel was asked for
    metrics.jsonl       append-only: one JSON object a line (see docs/run-store.md)
    results/            tables (parquet, csv) and JSON
    checkpoint.safetensors
    exports/            exports that were given no path of their own
    log.txt

A run whose process died says *interrupted*, whoever reads it and whenever.
"""

import fcntl
import io
import json
import os
import re
import secrets
import shutil
import socket
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from zo_core.errors import UserError
from zo_core.jobs import JOB, Job
from zo_core.settings import settings

State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
LIVE: tuple[State, ...] = ("queued", "running")
RESERVE = 64 * 1024
"""Bytes kept free for the final status; random, so that no file system can compress them away."""
RUN_ID = re.compile(r"^\d{8}-\d{6}-[a-z]+-[0-9a-f]{6}$")


class RunNotFoundError(LookupError):
    """No run of that id in this run store."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process that a run depends on, told apart from a later one with the same pid."""

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> "Process":
        """The calling process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """True if it is known to be gone; False if alive or on another host."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.started) > 2
                or process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True, slots=True)
class Status:
    """What ``status.json`` holds. Times are Unix seconds."""

    state: State = "queued"
    step: int = 0
    total: int = 0
    message: str = ""
    error: str = ""
    created: float = 0.0
    started: float | None = None
    finished: float | None = None
    worked: float = 0.0
    """Seconds of work before the last start, of a run that was resumed."""
    device: str = ""
    process: Process | None = None
    """The engine while queued (None for a remote engine), the worker while running."""
    details: dict[str, Any] = field(default_factory=dict)
    """Facts found on the way, such as the layer that ``auto`` named."""

    @classmethod
    def from_json(cls, text: str) -> "Status":
        """Parse ``status.json``; unknown keys of a later version are ignored."""
        raw = json.loads(text)
        known = {f.name for f in fields(cls)}
        kept = {k: v for k, v in raw.items() if k in known}
        if kept.get("process"):
            kept["process"] = Process(**kept["process"])
        return cls(**kept)

    @property
    def live(self) -> bool:
        """Queued or running."""
        return self.state in LIVE


def replace_file(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader or a crash sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def to_json(value: object) -> str:
    """Strict JSON on one line: NaN and infinities become null."""

    def clean(item: object) -> object:
        if isinstance(item, float) and not (item == item and abs(item) != float("inf")):
            return None
        if isinstance(item, dict):
            return {str(k): clean(v) for k, v in item.items()}
        if isinstance(item, list | tuple):
            return [clean(v) for v in item]
        return item

    return json.dumps(clean(value), allow_nan=False, default=str)


class Run:
    """One run folder. Cheap to make: nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Wrap an existing folder; use :func:`create` or :func:`get`."""
        self.path = path
        self.run_id = path.name

    # -- what a reader needs ------------------------------------------------------------------

    @property
    def job(self) -> Job:
        """The job spec."""
        return JOB.validate_json((self.path / "job.json").read_text())

    def status(self) -> Status:
        """The status, with a live state turned into *interrupted* when its process is gone."""
        status = Status.from_json((self.path / "status.json").read_text())
        if status.live and self._is_abandoned(status):
            # A worker may have finished between the two reads.
            status = Status.from_json((self.path / "status.json").read_text())
            if status.live:
                what = "this run began" if status.state == "queued" else "it finished"
                return replace(
                    status, state="interrupted", message=f"The engine stopped before {what}."
                )
        return status

    def stored_state(self) -> State:
        """The state as written, also if its process is gone."""
        return Status.from_json((self.path / "status.json").read_text()).state

    def _is_abandoned(self, status: Status) -> bool:
        if status.process is not None and status.process.is_dead():
            return True
        if status.state != "running":
            return False
        try:
            age = time.time() - (self.path / "heartbeat").stat().st_mtime
        except FileNotFoundError:
            age = time.time() - (status.started or status.created)
        return age > settings().heartbeat_timeout

    def read_metrics(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Whole metric records from byte ``offset`` on, and the offset to go on from."""
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return [], offset
        whole = data[: data.rfind(b"\n") + 1]
        records = []
        for line in whole.splitlines():
            with suppress(ValueError):  # a line torn by a crash or a full disk
                records.append(json.loads(line))
        return records, offset + len(whole)

    def seconds_of_work(self, status: Status) -> float | None:
        """Without waiting, None before it starts; up to the last sign of life of a dead worker."""
        if status.started is None:
            return status.worked or None
        end = status.finished or time.time()
        if not status.live and not status.finished:
            with suppress(OSError):
                end = (self.path / "heartbeat").stat().st_mtime
        return status.worked + max(0.0, end - status.started)

    def result(self, name: str) -> Path:
        """Path of a file under ``results/`` (it may not exist)."""
        return self.path / "results" / name

    def result_json(self, name: str = "summary.json") -> dict[str, Any] | None:
        """A JSON result, or None while there is none."""
        try:
            return json.loads(self.result(name).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def log_text(self) -> str:
        """The log so far."""
        try:
            return (self.path / "log.txt").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def zip_bytes(self) -> bytes:
        """The folder as a zip archive, without its exports: they are made from the rest."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(self.path.rglob("*")):
                inside = file.relative_to(self.path)
                hidden = file.name.startswith(".") or inside.parts[0] == "exports"
                if file.is_file() and not hidden:
                    archive.write(file, f"{self.run_id}/{inside}")
        return buffer.getvalue()

    # -- what a controller needs --------------------------------------------------------------

    def request_cancel(self) -> None:
        """Ask the job to stop. Harmless on a run that has ended."""
        if self.status().live:
            (self.path / "cancel").touch()

    @property
    def cancel_requested(self) -> bool:
        """Whether a cancel was asked for."""
        return (self.path / "cancel").exists()

    def delete(self) -> None:
        """Remove the folder.

        Raises:
            RuntimeError: the run is queued or running.
        """
        with suppress(ValueError, TypeError, KeyError):  # a damaged folder can still be deleted
            if self.status().live:
                raise RuntimeError(
                    f"Run {self.run_id} is still live: cancel it before deleting it."
                )
        shutil.rmtree(self.path)

    # -- what the worker needs ----------------------------------------------------------------

    def update(self, **changes: Any) -> Status:
        """Change fields of ``status.json`` and return the new status."""
        with self._locked():
            return self._write_status(**changes)

    def transition(self, sources: tuple[State, ...], **changes: Any) -> bool:
        """Change the status only if the stored state is one of ``sources``.

        The page, the engine and the worker may all want to move a run on (a cancel arrives while
        the worker begins it): whoever comes second sees False and leaves it alone.
        """
        with self._locked():
            status = Status.from_json((self.path / "status.json").read_text())
            if status.state not in sources:
                return False
            self._write_status(**changes)
            return True

    def _write_status(self, **changes: Any) -> Status:
        status = Status.from_json((self.path / "status.json").read_text())
        status = replace(status, **changes)
        replace_file(self.path / "status.json", to_json(asdict(status)))
        return status

    @contextmanager
    def worked_on(self) -> Iterator[None]:
        """Be the only one that works on the run for as long as the block lasts.

        Raises:
            UserError: another process does: it was taken for dead, and is not.
        """
        with (self.path / "worker.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"Another worker is still busy with {self.run_id}: resume it once that has "
                    "ended, or stop the engine first."
                ) from error
            except OSError:
                pass  # a file system without locks: no worse than not asking
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the run's lock against other threads, processes and hosts.

        The lock is on ``job.json`` because it always exists and is never replaced; it is opened
        for writing because NFS grants an exclusive lock only then.
        """
        with (self.path / "job.json").open("r+b") as file:
            with suppress(OSError):  # a file system without locks: no worse than not asking
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def reserve(self) -> None:
        """Keep a little disk space, so that a full disk can still be reported in the status."""
        (self.path / ".reserve").write_bytes(os.urandom(RESERVE))

    def release_reserve(self) -> None:
        """Free the space that :meth:`reserve` kept."""
        (self.path / ".reserve").unlink(missing_ok=True)

    def beat(self) -> None:
        """Say that the job is alive."""
        with suppress(OSError):
            (self.path / "heartbeat").touch()

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append one record; it is visible to readers when this returns."""
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write((to_json(record) + "\n").encode())

    def log(self, line: str) -> None:
        """Append a time-stamped line to ``log.txt``."""
        stamp = datetime.now(UTC).strftime("%H:%M:%S")
        with suppress(OSError), (self.path / "log.txt").open("a") as file:
            file.write(f"{stamp}  {line}\n")

    def write_result(self, name: str, data: bytes | str) -> None:
        """Write a file under ``results/`` atomically."""
        self.result(name).parent.mkdir(exist_ok=True)
        replace_file(self.result(name), data)


def create(job: Job, process: Process | None) -> Run:
    """Make the folder of a new queued run.

    Args:
        job: the validated spec.
        process: the engine's process, whose death ends the queue; None for a remote engine.
    """
    now = time.time()
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%d-%H%M%S")
    path = settings().runs_dir / f"{stamp}-{job.kind}-{secrets.token_hex(3)}"
    path.mkdir(parents=True)
    run = Run(path)
    try:
        (path / "job.json").write_text(job.model_dump_json(indent=1) + "\n")
        run.reserve()
        status = Status(created=now, process=process)
        replace_file(path / "status.json", to_json(asdict(status)))
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return run


def get(run_id: str) -> Run:
    """The run of that id.

    Raises:
        RunNotFoundError: the id is malformed or unknown.
    """
    path = settings().runs_dir / run_id
    if not RUN_ID.fullmatch(run_id) or not (path / "status.json").is_file():
        raise RunNotFoundError(
            f"No run {run_id!r} in {settings().runs_dir}: `python -m zo_core runs list` shows them."
        )
    return Run(path)


def list_runs(kinds: tuple[str, ...] = ("scan", "probe", "tune")) -> Iterator[Run]:
    """Runs of the given kinds, newest first. Folders that are no runs are passed over."""
    root = settings().runs_dir
    names = sorted((p.name for p in root.iterdir()), reverse=True) if root.is_dir() else []
    for name in names:
        if (
            RUN_ID.fullmatch(name)
            and name.split("-")[2] in kinds
            and (root / name / "status.json").is_file()
        ):
            yield Run(root / name)
