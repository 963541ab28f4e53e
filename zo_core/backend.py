"""Hand jobs to the engine: the app's and the command line's only door to the workers.

Nothing here computes, blocks on the engine's start, or imports torch. One background thread owns
the connection; :func:`submit` writes the run folder and leaves the rest to it.

Which engine:

1. ``ZO_BACKEND=tcp://host:8786`` or ``tls://host:8786``: a Dask scheduler somewhere else. It and
   its workers need this project importable, and the workers see the same run store through a
   shared file system, under the same path and with the same ``ZO_CACHE_DIR``::

       dask scheduler --port 8786
       PYTHONPATH=/path/to/project ZO_CACHE_DIR=/shared/cache \
           dask worker tcp://host:8786 --nthreads 1 --memory-limit 0 --resources device=1 \
           --preload zo_core.worker          # one a GPU, each with its CUDA_VISIBLE_DEVICES

   ``tcp://`` lets everyone who reaches the port run code: use it on a private network only, else
   ``tls://``. Certificates are Dask's configuration on every side, for example
   ``DASK_DISTRIBUTED__COMM__TLS__CA_FILE``, ``..._TLS__CLIENT__CERT``, ``..._TLS__CLIENT__KEY``
   here, ``..._TLS__SCHEDULER__...`` and ``..._TLS__WORKER__...`` there.
2. The engine that another process of this user shares (``cache/engine/engine.json``): the command
   line so uses the app's worker and its resident model.
3. An engine of our own, :mod:`zo_core.engine`, which ends with this process.
"""

import atexit
import threading
import time
from collections.abc import Callable
from typing import Any

from zo_core import engine_state, runs
from zo_core.connection import BackendError, Connection
from zo_core.failures import disk_sentence
from zo_core.jobs import Job
from zo_core.runs import Process, Run, Status

__all__ = [
    "BackendError",
    "cancel",
    "engine_status",
    "resume",
    "shutdown",
    "start",
    "submit",
    "wait",
    "workers",
]

RESUMABLE = ("interrupted", "cancelled", "failed")
POLL_EVERY = 0.1

_connection: Connection | None = None
_lock = threading.Lock()


def _engine() -> Connection:
    global _connection
    with _lock:
        if _connection is None:
            _connection = Connection()
            atexit.register(shutdown)
        return _connection


def start(share: bool = False) -> None:
    """Begin starting the engine, or connecting to one; returns at once. Call it as often as needed.

    Args:
        share: let other processes of this user find the engine, if it becomes our own.
    """
    _engine().start(share)


def engine_status() -> tuple[str, str]:
    """``idle``, ``starting``, ``ready`` or ``failed``, and a sentence about it."""
    return _engine().status()


def submit(job: Job) -> Run:
    """Create the run of a job and queue it; does not wait for the engine.

    Raises:
        BackendError: the run folder cannot be written.
    """
    try:
        # This process answers for the run until the engine has taken it.
        run = runs.create(job, Process.current())
    except OSError as error:
        raise BackendError(_unwritable(error)) from error
    _engine().queue(run)
    return run


def resume(run_id: str) -> Run:
    """Queue a tuning run again that was interrupted, cancelled or failed.

    Raises:
        BackendError: it is not such a run.
        RunNotFoundError: there is no such run.
    """
    run = runs.get(run_id)
    if run.job.kind != "tune":
        raise BackendError(f"Run {run_id} is a {run.job.kind}: only tuning runs can be resumed.")
    status = run.status()
    stored = run.stored_state()
    if status.state not in RESUMABLE:
        raise BackendError(_not_resumable(run_id, status))
    try:
        run.reserve()
        taken = run.transition(
            (stored,),
            state="queued",
            process=Process.current(),
            started=None,
            finished=None,
            worked=run.seconds_of_work(status) or 0.0,
            error="",
            message="",
        )
    except OSError as error:
        raise BackendError(_unwritable(error)) from error
    if not taken:
        raise BackendError(_not_resumable(run_id, run.status()))
    (run.path / "cancel").unlink(missing_ok=True)
    run.log("Resumed.")
    _engine().queue(run)
    return run


def cancel(run_id: str) -> None:
    """Ask a run to stop. One that waits ends at once; one that has ended is left alone.

    Raises:
        RunNotFoundError: there is no such run.
        BackendError: the run folder cannot be written.
    """
    run = runs.get(run_id)
    if not run.status().live:
        return
    try:
        run.request_cancel()
        waiting = run.transition(
            ("queued",),
            state="cancelled",
            message="Cancelled before it began.",
            finished=time.time(),
        )
        if waiting:
            run.release_reserve()
    except OSError as error:
        raise BackendError(_unwritable(error)) from error


def workers() -> list[dict[str, Any]]:
    """State of every live worker (docs/run-store.md, "Engine state")."""
    return engine_state.read_workers()


def wait(
    run: Run,
    on_poll: Callable[[Status], None] | None = None,
    timeout: float | None = None,
) -> Status:
    """Wait until a run has ended, for the command line.

    Args:
        run: the run.
        on_poll: called with the status about ten times a second.
        timeout: seconds after which to return anyway.

    Returns:
        The last status; it is still live only after a timeout.
    """
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        status = run.status()
        if on_poll is not None:
            on_poll(status)
        if not status.live or (end is not None and time.monotonic() >= end):
            return status
        time.sleep(POLL_EVERY)


def shutdown() -> None:
    """Leave the engine; our own ends with all its workers. Runs at exit by itself."""
    global _connection
    with _lock:
        connection, _connection = _connection, None
    atexit.unregister(shutdown)
    if connection is not None:
        connection.close()


def _unwritable(error: OSError) -> str:
    return disk_sentence(error) or f"The run folder cannot be written: {error}."


def _not_resumable(run_id: str, status: Status) -> str:
    if status.live:
        return f"Run {run_id} is already {status.state}."
    return f"Run {run_id} is {status.state}: only interrupted, cancelled or failed runs resume."
