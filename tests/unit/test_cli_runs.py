"""``python -m zo_core runs``, in this process."""

import sys
from pathlib import Path

import pytest

from zo_core import runs
from zo_core.cli import main
from zo_core.jobs import TuneJob
from zo_core.runs import Process
from zo_core.settings import settings


def test_cancel_ends_a_waiting_run_and_asks_a_running_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    waiting, running = (runs.create(TuneJob(), Process.current()) for _ in range(2))
    running.transition(("queued",), state="running")
    for run in (waiting, running):
        monkeypatch.setattr(sys, "argv", ["zo_core", "runs", "cancel", run.run_id])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    assert waiting.status().state == "cancelled"
    assert running.status().state == "running"
    assert running.cancel_requested
