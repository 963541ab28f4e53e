"""Files under ``cache/engine/``: what each worker is, and where a shared engine listens.

Workers replace ``worker-<host>-<pid>.json`` every second (fields: docs/run-store.md, "Engine
state"). An engine that is shared writes ``engine.json`` with its address and TLS keys: whoever can
read that file can run code as its owner, so it is made readable for its owner only.
"""

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zo_core.runs import Process, replace_file, to_json
from zo_core.settings import settings

FRESH = 15.0
"""Seconds after which the state of a worker on another host counts as old."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine listens, its process, and the PEM texts that open it."""

    address: str
    workers: int
    process: Process
    ca: str
    cert: str
    key: str

    @classmethod
    def from_json(cls, text: str) -> "EngineAddress":
        """Parse the line an engine prints and the content of ``engine.json``."""
        raw = json.loads(text)
        return cls(**{**raw, "process": Process(**raw["process"])})

    def to_json(self) -> str:
        """The reverse of :meth:`from_json`, on one line."""
        return json.dumps(asdict(self))


def worker_file(process: Process) -> Path:
    """The state file of a worker process."""
    return settings().engine_dir / f"worker-{process.host}-{process.pid}.json"


def publish_worker(state: dict[str, Any], process: Process) -> None:
    """Replace the state file of this worker; a failure is not worth a job."""
    with suppress(OSError):
        path = worker_file(process)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, to_json(state))


def read_workers() -> list[dict[str, Any]]:
    """The state of every live worker; files that dead processes of this host left are removed."""
    states = []
    for path in sorted(settings().engine_dir.glob("worker-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text())
            process = Process(**state["process"])
            if process.is_dead():
                path.unlink(missing_ok=True)
            elif process.host == socket.gethostname() or time.time() - state["updated"] < FRESH:
                states.append(state)
    return states


def share_engine(engine: EngineAddress) -> None:
    """Publish an engine for the other processes of this user.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = _shared_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".engine.{os.getpid()}.{secrets.token_hex(3)}")
    try:
        # Made with its final mode: there is no moment at which others can read the key.
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as f:
            f.write(engine.to_json())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_shared_engine() -> EngineAddress | None:
    """The live shared engine of this host and cache folder, if there is one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        engine = EngineAddress.from_json(_shared_file().read_text())
        # On another host the address (loopback) would mean a different machine.
        if engine.process.host == socket.gethostname() and not engine.process.is_dead():
            return engine
    return None


def unshare_engine(engine: EngineAddress) -> None:
    """Remove ``engine.json`` if it names this engine."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if EngineAddress.from_json(_shared_file().read_text()).process == engine.process:
            _shared_file().unlink()


def _shared_file() -> Path:
    return settings().engine_dir / "engine.json"
