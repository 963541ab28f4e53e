"""``status.json`` of a comparison: how far it is, written by the process that works on it."""

import json
import time
from dataclasses import dataclass, fields, replace
from typing import Literal

from zo_core.runs import Process
from zo_core.settings import settings

State = Literal["starting", "running", "done", "failed", "cancelled", "interrupted"]
LIVE: tuple[State, ...] = ("starting", "running")


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """The latest session of work on a comparison. Times are Unix seconds."""

    state: State = "interrupted"
    error: str = ""
    message: str = ""
    """What happened last."""
    process: Process | None = None
    """The driver: as long as it lives, a live state is true."""
    started: float = 0.0
    updated: float = 0.0
    finished: float | None = None
    total: int = 0
    """Cells there are in all, as far as known."""
    done: int = 0
    failed: int = 0
    """Failed for good; another session tries them again."""
    diverged: int | None = None
    """None: written by a version that counted them as failed."""
    running: int = 0
    eta: float | None = None
    """Seconds left, by the pace of this session."""

    @classmethod
    def from_json(cls, text: str) -> "SessionStatus":
        """Parse ``status.json``; live states of a driver that is gone become *interrupted*."""
        raw = json.loads(text)
        kept = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        if kept.get("process"):
            kept["process"] = Process(**kept["process"])
        status = cls(**kept)
        return replace(status, state="interrupted") if status.live and status._gone else status

    @property
    def live(self) -> bool:
        """A process works on it, or is about to."""
        return self.state in LIVE

    @property
    def settled(self) -> int:
        """Cells that have ended, well or not."""
        return self.done + self.failed + (self.diverged or 0)

    @property
    def losses(self) -> str:
        """Cells without a result in words, as ``, 2 failed, 1 diverged``; empty if none."""
        failed = "failed or diverged" if self.diverged is None else "failed"
        counts = {failed: self.failed, "diverged": self.diverged}
        return "".join(f", {n} {what}" for what, n in counts.items() if n)

    @property
    def _gone(self) -> bool:
        if self.process is None or self.process.is_dead():
            return True
        # On another host only silence tells.
        silent = time.time() - self.updated > settings().heartbeat_timeout
        return silent and self.process.host != Process.current().host
