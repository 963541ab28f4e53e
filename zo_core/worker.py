"""Run one job inside a Dask worker process, and decide how its run ends.

Dask loads this module in every worker (``preload``), calls :func:`dask_setup` once, and
:func:`execute` for each job. The module imports no torch: it is also imported by the process that
submits. What a worker *is* (device, free memory, resident models, current run) is published by
:class:`Presence` for as long as the process lives.
"""

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from zo_core import engine_state, failures
from zo_core.jobs import Job
from zo_core.progress import Cancelled, JobContext
from zo_core.runs import Process, Run
from zo_core.settings import settings

RECIPES = {
    "load": "zo_core.recipes.load:run_load",
    "unload": "zo_core.recipes.load:run_unload",
    "scan": "zo_core.recipes.scan:run_scan",
    "mechanism": "zo_core.recipes.mechanism:run_mechanism",
    "probe": "zo_core.recipes.probe:run_probe",
    "tune": "zo_core.recipes.tune:run_tune",
    "preview": "zo_core.recipes.preview:run_preview",
    "replay": "zo_core.recipes.replay:run_replay",
    "export": "zo_core.recipes.export:run_export",
}
RESIDENT = "zo_core.models.resident"
TICK = 0.25
LONGEST_RECORD = 1 << 20
EXIT_KILLED, EXIT_POISONED, EXIT_ORPHAN = 40, 41, 42
Recipe = Callable[[Job, Run, JobContext], None]


def recipe(kind: str) -> Recipe:
    """The function that does a job of this kind; imports what it needs."""
    module, _, name = RECIPES[kind].partition(":")
    return getattr(import_module(module), name)


class Presence:
    """Warms the worker up once, then publishes its state every second until it ends."""

    def __init__(self, name: str, has_manager: bool) -> None:
        """Start both threads.

        Args:
            name: the Dask name of the worker.
            has_manager: a Nanny is the parent, so that losing the parent means being orphaned.
        """
        self.name = name
        self.process = Process.current()
        self.run_id: str | None = None
        self.device = ""
        self.warm = threading.Event()
        self._parent = os.getppid() if has_manager else None
        self._stopped = threading.Event()
        threading.Thread(target=self._warm_up, name="zo-warm-up", daemon=True).start()
        threading.Thread(target=self._publish, name="zo-presence", daemon=True).start()

    def _warm_up(self) -> None:
        """Import now what the first job needs: several seconds of torch and transformers."""
        try:
            for kind in RECIPES:
                recipe(kind)
            import torch

            if torch.cuda.is_available():
                torch.cuda.init()
                self.device = "cuda:0"
            else:
                self.device = "cpu"
        except Exception:
            traceback.print_exc()  # the job meets the same error and reports it
        finally:
            self.warm.set()

    def _publish(self) -> None:
        while not self._stopped.is_set():
            if self._parent is not None and os.getppid() != self._parent:
                self.leave(EXIT_ORPHAN)
            self.publish()
            self._stopped.wait(1.0)

    def publish(self) -> None:
        """Write the state file now: whoever sees a job end sees what it left resident, too."""
        engine_state.publish_worker(self._state(), self.process)

    def _state(self) -> dict[str, Any]:
        process = self.process
        state: dict[str, Any] = {
            "worker": self.name,
            "process": {"host": process.host, "pid": process.pid, "started": process.started},
            "device": self.device,
            "device_name": "CPU" if self.device == "cpu" else "",
            "device_memory": None,
            "device_memory_free": None,
            "worker_memory": psutil.Process().memory_info().rss,
            "resident": [],
            "run_id": self.run_id,
            "updated": time.time(),
        }
        if not self.warm.is_set():
            return state
        with suppress(Exception):  # a poisoned CUDA context must not end this thread
            if self.device.startswith("cuda"):
                torch = sys.modules["torch"]
                free, total = torch.cuda.mem_get_info()
                state["device_memory_free"], state["device_memory"] = free, total
                state["device_name"] = torch.cuda.get_device_name()
        with suppress(Exception):
            if RESIDENT in sys.modules:
                state["resident"] = sys.modules[RESIDENT].describe()
        return state

    def stop(self) -> None:
        """Stop publishing and remove the state file."""
        self._stopped.set()
        with suppress(OSError):
            engine_state.worker_file(self.process).unlink(missing_ok=True)

    def leave(self, code: int) -> None:
        """End the process at once; its manager starts a new one."""
        self.stop()
        sys.stderr.flush()
        os._exit(code)


_presence: Presence | None = None
_presence_lock = threading.Lock()


def presence(name: str = "", has_manager: bool = False) -> Presence:
    """The presence of this worker process, made at the first call."""
    global _presence
    with _presence_lock:
        if _presence is None:
            _presence = Presence(name or f"worker-{os.getpid()}", has_manager)
        return _presence


def dask_setup(worker: Any) -> None:
    """Called by Dask when the worker starts (``--preload zo_core.worker``)."""
    presence(str(worker.name), has_manager=worker.nanny is not None)


def dask_teardown(worker: Any) -> None:
    """Called by Dask when the worker closes."""
    presence(str(worker.name)).stop()


class _Watch:
    """Beside a running job: heartbeat, held-back progress, and the end of a cancel's grace."""

    def __init__(self, run: Run, context: JobContext, me: Presence) -> None:
        self._run, self._context, self._me = run, context, me
        self._finished = threading.Event()
        # Held while the run's end is decided, so that a kill and a normal end exclude each other.
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="zo-watch", daemon=True)
        run.beat()
        self._thread.start()

    def _watch(self) -> None:
        asked: float | None = None
        beaten = time.monotonic()
        while not self._finished.wait(TICK):
            now = time.monotonic()
            if now - beaten >= 1.0:
                self._run.beat()
                beaten = now
            with suppress(OSError, ValueError):  # a full disk is the job's to report
                self._context.flush()
            if asked is None:
                asked = now if self._run.cancel_requested else None
            elif now - asked > settings().cancel_grace:
                self._kill()

    def _kill(self) -> None:
        with self._ending:
            if self._finished.is_set():
                return
            seconds = f"{settings().cancel_grace:g} s"
            self._run.log(f"Still busy {seconds} after the cancel: the worker is killed.")
            with suppress(OSError):  # then it reads as interrupted
                _finish(self._run, state="cancelled", message=f"Cancelled; killed after {seconds}.")
            self._me.leave(EXIT_KILLED)

    def stop(self) -> None:
        """Called when the job's function has returned or raised."""
        with self._ending:
            self._finished.set()
        self._thread.join()


def execute(run_id: str, runs_dir: str) -> str:
    """Do the job of a queued run; returns the state it ended in, or why it was left alone.

    Args:
        run_id: the run.
        runs_dir: folder of the run store, as the submitter sees it.

    Raises:
        FileNotFoundError: this worker does not see that run store. Nothing else is raised.
    """
    run = Run(Path(runs_dir) / run_id)
    if not (run.path / "status.json").is_file():
        raise FileNotFoundError(f"{run.path} does not exist on the worker")
    me = presence()
    try:
        if not _claim(run, me):
            return "skipped"
        me.run_id = run_id
        return _run_job(run, me)
    except Exception as error:  # the disk was full when the run was taken or ended
        traceback.print_exc()
        with suppress(OSError):
            _finish(run, state="failed", error=failures.describe(error).sentence)
        return "failed"
    finally:
        me.run_id = None


def _claim(run: Run, me: Presence) -> bool:
    """Take a queued run. Anything else that Dask hands out is settled or left alone."""
    if run.transition(
        ("queued",),
        state="running",
        process=me.process,
        started=time.time(),
        device=me.device,
        message="Starting",
    ):
        return True
    # Dask hands a job out again after its worker died, and still hands out a cancelled one.
    if run.status().state == "interrupted":
        run.transition(
            ("running",),
            state="interrupted",
            finished=time.time(),
            message="The worker process died before the job finished.",
        )
        with suppress(OSError):
            run.release_reserve()
    return False


def _run_job(run: Run, me: Presence) -> str:
    context = JobContext(run)
    watch = _Watch(run, context, me)
    failure: failures.Failure | None = None
    state, message = "done", ""
    try:
        with run.worked_on():
            _work(run, me, context)
    except Cancelled:
        state, message = "cancelled", "Cancelled."
    except BaseException as error:
        state, failure = "failed", failures.describe(error)
        if not failure.expected:
            context.log(traceback.format_exc())
        # Frames of the traceback hold tensors, which would outlive the job.
        traceback.clear_frames(error.__traceback__)
    watch.stop()
    if failure is not None and failure.out_of_memory:
        _release_memory()
    context.log(failure.sentence if failure else message or "Done.")
    me.publish()
    last = context.take_pending()
    last |= {"message": message} if message else {}
    _finish(run, **last, state=state, error=failure.sentence if failure else "")
    if failure is not None and failure.poisoned:
        me.leave(EXIT_POISONED)
    return state


def _work(run: Run, me: Presence, context: JobContext) -> None:
    _mend(run)
    job = run.job
    context.log(f"Started on {me.name}, process {me.process.pid}.")
    while not me.warm.wait(TICK):
        context.check_cancelled()
    device = "cpu" if getattr(job, "device", "") == "cpu" else me.device
    run.update(device=device, message="")
    context.check_cancelled()
    recipe(job.kind)(job, run, context)


def _finish(run: Run, **changes: Any) -> None:
    """Write the final status, on a full disk in the room the reserve file kept free."""
    with suppress(OSError):
        run.release_reserve()
    run.update(**changes, finished=time.time())


def _mend(run: Run) -> None:
    """Cut a metrics line that a crash or a full disk tore, or the next record would join it."""
    path = run.path / "metrics.jsonl"
    with suppress(FileNotFoundError), path.open("r+b") as file:
        start = max(0, file.seek(0, os.SEEK_END) - LONGEST_RECORD)
        file.seek(start)
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(start + data.rfind(b"\n") + 1)


def _release_memory() -> None:
    if RESIDENT in sys.modules:
        sys.modules[RESIDENT].clear()
    gc.collect()
