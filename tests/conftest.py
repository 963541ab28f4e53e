"""Every test session has its own run store; integration tests share one real engine."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CANCEL_GRACE = 3.0

# Read when torch is imported, which tests/unit/conftest.py does before pytest_configure is called:
# threads that spin while they wait make torch many times slower on cores that others use too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Point the project at a temporary cache before any test module reads the settings."""
    config.stash[CACHE] = Path(tempfile.mkdtemp(prefix="zoscope-tests-"))
    os.environ["ZO_CACHE_DIR"] = str(config.stash[CACHE])
    os.environ["ZO_CANCEL_GRACE"] = str(CANCEL_GRACE)
    os.environ.pop("ZO_BACKEND", None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the temporary cache."""
    shutil.rmtree(config.stash[CACHE], ignore_errors=True)


CACHE = pytest.StashKey[Path]()


@pytest.fixture(scope="session")
def cache_dir(pytestconfig: pytest.Config) -> Path:
    """The cache folder of this test session."""
    return pytestconfig.stash[CACHE]


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    """The embedded engine, ready; it restarts by itself if a test kills it."""
    from zo_core import backend

    backend.start()
    until(lambda: backend.engine_status()[0] in ("ready", "failed"), 60)
    assert backend.engine_status()[0] == "ready", backend.engine_status()
    yield
    backend.shutdown()


def until(condition: Callable[[], object], timeout: float) -> float:
    """Wait for a condition and return the seconds it took; fail the test when it does not come."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > timeout:
            pytest.fail(f"not within {timeout:g} s")
        time.sleep(0.02)
    return time.monotonic() - begin
