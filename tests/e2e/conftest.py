"""A real app server and a real browser; console errors fail the test."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class App:
    """An app server in a process of its own, over a run store that outlives it."""

    def __init__(self, cache: Path) -> None:
        """Start on a free port of the loopback."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cache = cache
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zo_core", "app", "--port", str(self.port)],
            cwd=ROOT,
            env=os.environ | {"ZO_CACHE_DIR": str(self.cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=1)
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the app did not answer within 30 s")

    def kill(self) -> None:
        """Kill the server the hard way."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End the server and its engine."""
        self.process.terminate()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.kill()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The app over an empty run store."""
    server = App(tmp_path_factory.mktemp("cache"))
    yield server
    server.stop()


@pytest.fixture
def page(app: App) -> Iterator["object"]:
    """A browser tab at 1440 px; any console error or page error fails the test."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    from playwright.sync_api import ConsoleMessage, expect, sync_playwright

    errors: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        # On a deep link Streamlit's client looks for its server below the page's path first, and
        # says so when it is not there; nothing of ours can stop that request.
        probing = "404" in message.text and "/_stcore/" in message.location["url"]
        if message.type == "error" and not probing:
            errors.append(f"{message.text} ({message.location['url']})")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context(
            viewport={"width": 1440, "height": 1000}, accept_downloads=True
        )
        tab = context.new_page()
        tab.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        tab.on("console", hear)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        yield tab
        browser.close()
    assert not errors
