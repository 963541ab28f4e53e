"""The engine with real processes: queueing, cancel, crashes, sharing, a full disk."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import CANCEL_GRACE, until
from zo_core import backend, connection, runs
from zo_core.jobs import Job, LoadJob, ProbeJob, ScanJob, TuneJob
from zo_core.runs import Run
from zo_core.settings import ROOT, settings

pytestmark = pytest.mark.timeout(180)
LONG = 1_000_000
BUSY = 90.0
"""Seconds a short job may take on a busy machine."""


def short_scan() -> ScanJob:
    """About the smallest job there is."""
    return ScanJob(text="prompt", prompt="The harbour was quiet.", batch_size=1)


def long_tune(**fields: object) -> TuneJob:
    """A tuning run that takes steps until somebody stops it."""
    values = {
        "scope": "layer:14",
        "steps": LONG,
        "batch_size": 2,
        "train_examples": 16,
        "eval_examples": 2,
        "eval_every": 0,
        "checkpoint_every": 5,
    }
    return TuneJob(**(values | fields))


def submit_running(job: Job) -> Run:
    """Submit a job and wait until it makes progress."""
    run = backend.submit(job)
    until(lambda: run.status().step > 0 or not run.status().live, BUSY)
    assert run.status().state == "running", run.status()
    return run


def finish(run: Run) -> runs.Status:
    """Wait for the end of a short job."""
    status = backend.wait(run, timeout=BUSY)
    assert not status.live, status
    return status


@pytest.fixture
def tuning(engine: None) -> Iterator[Run]:
    """A run that is taking steps; cancelled afterwards if it still does."""
    run = submit_running(long_tune())
    yield run
    backend.cancel(run.run_id)
    finish(run)


def python(code: str, cache: Path) -> "subprocess.Popen[str]":
    """A second process with its own interpreter and the given cache folder."""
    environment = os.environ | {"ZO_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_import_is_light(cache_dir: Path) -> None:
    code = """
        import sys
        from zo_core import backend
        backend.engine_status(), backend.workers()
        heavy = {"torch", "transformers", "distributed", "streamlit"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert python(code, cache_dir).communicate()[0].strip() == "[]"


def test_job_runs_to_its_end(engine: None) -> None:
    begin = time.monotonic()
    run = backend.submit(short_scan())
    assert time.monotonic() - begin < 0.2, "submit waits for the engine"
    seen: list[str] = []
    status = backend.wait(run, on_poll=lambda s: seen.append(s.state), timeout=BUSY)
    assert status.state == "done", status
    assert seen[-1] == "done"
    assert status.finished is not None
    assert status.started is not None
    assert status.process is not None
    assert status.process.pid not in (os.getpid(), None)
    assert status.device in ("cpu", "cuda:0")
    assert run.result_json() is not None
    assert not (run.path / ".reserve").exists()


def test_worker_publishes_what_it_is(engine: None) -> None:
    run = backend.submit(LoadJob())
    assert finish(run).state == "done", run.status()
    until(lambda: any(w["resident"] for w in backend.workers()), 5)
    worker = backend.workers()[0]
    assert worker["device"]
    assert worker["process"]["pid"] == run.status().process.pid
    assert worker["resident"][0]["model"] == "demo"
    assert 0 < worker["worker_memory"] < 2 * 2**30


def test_two_launches_at_once_both_finish(engine: None) -> None:
    first, second = (backend.submit(short_scan()) for _ in range(2))
    assert (finish(first).state, finish(second).state) == ("done", "done")
    if len(backend.workers()) == 1:
        assert first.status().finished < second.status().started, "first come, first served"


def test_cancel_and_resume(tuning: Run) -> None:
    waiting = backend.submit(short_scan())
    until(lambda: (waiting.path / "status.json").exists(), 1)
    backend.cancel(waiting.run_id)
    assert waiting.status().state == "cancelled", "a queued run is cancelled at once"
    with pytest.raises(backend.BackendError, match="already running"):
        backend.resume(tuning.run_id)

    backend.cancel(tuning.run_id)
    assert until(lambda: not tuning.status().live, 5) < 2
    status = tuning.status()
    assert (status.state, status.error) == ("cancelled", ""), status
    assert tuning.result("summary.json").exists() is False
    stopped_at = status.step

    assert backend.resume(tuning.run_id).run_id == tuning.run_id
    until(lambda: tuning.status().step > stopped_at, BUSY)
    records, _ = tuning.read_metrics()
    steps = [r["step"] for r in records if r["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or taken twice"
    assert waiting.status().state == "cancelled", "it never ran"


def test_job_that_no_worker_can_take_fails(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Dask itself reports as an error: here a function that does not accept the arguments,
    # in life a worker without this project or without the run store's disk.
    monkeypatch.setattr(connection.worker, "execute", os.getpid)
    run = backend.submit(short_scan())
    assert finish(run).state == "failed"
    assert "must see the same run store" in run.status().error


def test_only_stopped_tuning_runs_resume(engine: None) -> None:
    scan = backend.submit(short_scan())
    finish(scan)
    with pytest.raises(backend.BackendError, match="only tuning runs"):
        backend.resume(scan.run_id)
    tune = backend.submit(long_tune(steps=1))
    assert finish(tune).state == "done"
    with pytest.raises(backend.BackendError, match="is done"):
        backend.resume(tune.run_id)


def test_user_error_is_the_status(engine: None) -> None:
    status = finish(run := backend.submit(long_tune(scope="layer:99")))
    assert status.state == "failed"
    assert "99" in status.error
    assert "Unexpected" not in status.error
    assert "Traceback" not in run.log_text()


def test_job_that_ignores_the_cancel_is_killed(engine: None) -> None:
    # One forward pass of this batch takes far longer than the grace, and nothing looks meanwhile.
    busy = backend.submit(ProbeJob(batch_size=400, layers=[0], draws=1))
    until(lambda: "Started" in busy.log_text(), BUSY)
    time.sleep(2)
    backend.cancel(busy.run_id)
    seconds = until(lambda: not busy.status().live, CANCEL_GRACE + 5)
    assert seconds > CANCEL_GRACE - 1, "it stopped by itself: the test's job is too small"
    assert busy.status().state == "cancelled"
    assert "killed" in busy.status().message
    assert finish(backend.submit(short_scan())).state == "done"


def test_killed_worker(tuning: Run) -> None:
    queued = backend.submit(short_scan())
    pid = tuning.status().process.pid
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: tuning.status().state == "interrupted", 5) < 2
    assert finish(queued).state == "done", "a job behind the killed worker still runs"
    assert queued.status().process.pid != pid
    assert tuning.stored_state() == "interrupted", "the new worker settled it"
    assert "worker process died" in tuning.status().message
    assert tuning.read_metrics()[0], "what was written is kept"


def test_killed_engine_is_started_again(engine: None) -> None:
    running = submit_running(long_tune())
    queued = backend.submit(short_scan())
    until(lambda: queued.status().process != runs.Process.current(), 5)
    worker, owner = running.status().process, queued.status().process
    assert owner.pid not in (os.getpid(), worker.pid)
    os.kill(owner.pid, signal.SIGKILL)
    until(lambda: worker.is_dead() and owner.is_dead(), 5)
    assert queued.status().state == running.status().state == "interrupted"
    assert backend.engine_status()[0] == "failed"
    assert finish(backend.submit(short_scan())).state == "done"
    assert backend.engine_status()[0] == "ready"


def test_shared_engine_and_killed_owner(tmp_path: Path) -> None:
    owner = python(
        """
        import sys, time
        from zo_core import backend
        backend.start(share=True)
        while backend.engine_status()[0] == "starting":
            time.sleep(0.02)
        print(backend.engine_status(), flush=True)
        time.sleep(600)
        """,
        tmp_path,
    )
    try:
        assert owner.stdout is not None
        assert "ready" in owner.stdout.readline()
        shared = tmp_path / "engine" / "engine.json"
        assert stat.S_IMODE(shared.stat().st_mode) == 0o600
        family = psutil.Process(owner.pid).children(recursive=True)
        guest = python(
            """
            import json, time, psutil
            from zo_core import backend
            from zo_core.jobs import ScanJob, TuneJob
            backend.start()
            done = backend.wait(backend.submit(ScanJob(text="prompt", prompt="A quiet harbour.")))
            run = backend.submit(TuneJob(scope="layer:14", steps=100000, eval_examples=2))
            while run.status().state == "queued":
                time.sleep(0.02)
            print(json.dumps({"scan": done.state, "worker": done.process.pid,
                              "children": len(psutil.Process().children()), "run": run.run_id}))
            """,
            tmp_path,
        )
        facts = json.loads(guest.communicate(timeout=BUSY)[0])
        assert facts["scan"] == "done"
        assert facts["children"] == 0, "it started no engine of its own"
        assert facts["worker"] in [p.pid for p in family]
        run = Run(tmp_path / "runs" / facts["run"])
        assert run.status().state == "running", "a run outlives the guest that submitted it"

        owner.kill()
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, "processes outlive the owner of the engine"
        assert run.status().state == "interrupted"
    finally:
        owner.kill()
        owner.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)],
            check=False,
            capture_output=True,
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_full_disk(engine: None, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "cache_dir", small_disk)
    run = submit_running(long_tune(checkpoint_every=1_000_000))
    until(lambda: len(run.read_metrics()[0]) > 3, BUSY)
    fill(small_disk / "filler")
    status = finish(run)
    assert status.state == "failed", status
    assert "disk is full" in status.error
    assert "kept" in status.error
    records, _ = run.read_metrics()
    steps = [r["step"] for r in records if r["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    with pytest.raises(backend.BackendError, match="disk is full"):
        backend.submit(short_scan())

    (small_disk / "filler").unlink()
    backend.resume(run.run_id)
    until(lambda: run.status().step > steps[-1] or not run.status().live, BUSY)
    assert run.status().state == "running", run.status()
    backend.cancel(run.run_id)
    finish(run)


def test_unwritable_cache_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(settings(), "cache_dir", tmp_path / "file" / "cache")
    with pytest.raises(backend.BackendError, match="cannot be written"):
        backend.submit(short_scan())


@pytest.fixture
def own_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A connection of its own for the test, beside the session's engine."""
    monkeypatch.setattr(backend, "_connection", None)
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 1.0)
    yield
    backend.shutdown()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("tcp://127.0.0.1:9", "No Dask scheduler answers"),
        ("tls://127.0.0.1:9", "no certificates"),
        ("127.0.0.1:8786", "no scheduler address"),
    ],
)
def test_unreachable_backend_is_a_sentence(
    own_connection: None, monkeypatch: pytest.MonkeyPatch, address: str, words: str
) -> None:
    monkeypatch.setattr(settings(), "backend", address)
    run = backend.submit(short_scan())
    assert finish(run).state == "failed"
    assert words in run.status().error
    assert backend.engine_status() == ("failed", run.status().error)


def test_remote_scheduler(
    own_connection: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dask = [str(Path(sys.executable).with_name("dask"))]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = tmp_path / "scheduler.json"
    loopback = ["--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    worker = ["--nthreads", "1", "--memory-limit", "0", "--resources", "device=1"]
    preload = ["--preload", "zo_core.worker"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [
        subprocess.Popen(
            [*dask, "scheduler", "--port", "0", "--scheduler-file", str(found), *loopback], **quiet
        )
    ]
    try:
        until(lambda: found.exists() and found.stat().st_size > 0, 30)
        processes.append(
            subprocess.Popen(
                [*dask, "worker", "--scheduler-file", str(found), *loopback, *worker, *preload],
                **quiet,
            )
        )
        monkeypatch.setattr(settings(), "backend", json.loads(found.read_text())["address"])
        monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 10.0)
        run = backend.submit(short_scan())
        until(lambda: run.status().process is None or run.status().state != "queued", 10)
        assert finish(run).state == "done", run.status()
        assert "Connected to tcp://" in backend.engine_status()[1]

    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(10)
