"""The command line as a user runs it, beside an app that shares its engine."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from zo_core.runs import Run
from zo_core.settings import ROOT

PATIENCE = 150.0
"""Seconds a command may take on a busy machine."""


@dataclass
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout, which has to be one JSON object."""
        value = json.loads(self.out.rstrip("\n").splitlines()[-1])
        assert isinstance(value, dict)
        return value

    def expect(self, code: int) -> "Answer":
        """This answer, if it has the exit code; no command ever shows a traceback."""
        assert self.code == code, (self.code, self.out[-2000:], self.err[-4000:])
        assert "Traceback" not in self.out + self.err, self.err[-4000:]
        return self


@dataclass
class CommandLine:
    """``python -m zo_core`` with a cache folder of its own."""

    cache: Path
    extra: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        """Begin a command."""
        environment = os.environ | {"ZO_CACHE_DIR": str(self.cache), "COLUMNS": "200"} | self.extra
        return subprocess.Popen(
            [sys.executable, "-m", "zo_core", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: object) -> Answer:
        """Run a command to its end."""
        return self.end(self.start(*arguments))

    @staticmethod
    def end(process: "subprocess.Popen[str]") -> Answer:
        """Wait for a command that was begun."""
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        return Answer(process.returncode, out, err)

    def run(self, run_id: str) -> Run:
        """A run in this cache."""
        return Run(self.cache / "runs" / run_id)

    def ids(self) -> set[str]:
        """Every run in this cache."""
        root = self.cache / "runs"
        return {p.name for p in root.iterdir()} if root.is_dir() else set()


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line beside a process that shares its engine, as the app does."""
    cache = tmp_path_factory.mktemp("cli")
    code = """
        import sys, time
        from zo_core import backend
        backend.start(share=True)
        while backend.engine_status()[0] == "starting":
            time.sleep(0.05)
        print(backend.engine_status(), flush=True)
        sys.stdin.read()
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | {"ZO_CACHE_DIR": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        assert "ready" in owner.stdout.readline()
        yield CommandLine(cache)
    finally:
        owner.kill()
        owner.communicate()
