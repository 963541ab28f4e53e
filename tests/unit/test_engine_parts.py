"""The engine's small parts that need no process: sentences, progress, state files, GPU lists."""

import errno
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from zo_core import engine, engine_state, failures, runs, worker
from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.progress import Cancelled, JobContext
from zo_core.runs import Process, Run
from zo_core.settings import settings


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A queued run in a store of its own."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    return runs.create(TuneJob(), Process.current())


def test_user_error_is_passed_on_as_it_is() -> None:
    assert failures.describe(UserError("layer: 99 is out of range.")) == failures.Failure(
        "layer: 99 is out of range."
    )


def test_full_disk_is_named_also_when_a_library_hides_it() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/x")
        except OSError as inner:
            raise RuntimeError("write failed") from inner
    except RuntimeError as error:
        hidden = failures.describe(error)
    assert hidden.expected
    assert "disk is full" in hidden.sentence
    text = RuntimeError("I/O error: No space left on device (os error 28)")
    assert "disk is full" in failures.describe(text).sentence


def test_gpu_memory_error_says_needed_and_free() -> None:
    torch = pytest.importorskip("torch")
    failure = failures.describe(
        torch.cuda.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 14.10 GiB. GPU 0 has a total capacity of "
            "139.81 GiB of which 11.00 GiB is free. Process 1 has 128 GiB in use."
        )
    )
    assert failure.out_of_memory
    assert not failure.poisoned
    assert "14.10 GiB more needed, 11.00 GiB of 139.81 GiB free" in failure.sentence
    assert "bfloat16" in failure.sentence


def test_cuda_error_means_that_the_worker_must_restart() -> None:
    failure = failures.describe(
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors")
    )
    assert failure.poisoned
    assert "illegal memory access" in failure.sentence
    assert "\n" not in failure.sentence


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no memory")])
def test_host_memory(error: BaseException) -> None:
    assert failures.describe(error).out_of_memory
    assert failures.describe(error).expected


def test_defect_names_its_type_and_the_log() -> None:
    failure = failures.describe(ValueError("boo"))
    assert failure.sentence == "Unexpected ValueError: boo (see log)"
    assert not failure.expected


def test_progress_is_written_rarely_and_the_end_always(run: Run) -> None:
    context = JobContext(run)
    writes = 0
    last = None
    for step in range(1, 201):
        context.progress(step, 1000, f"step {step}")
        stamp = (run.path / "status.json").stat().st_ino
        writes += stamp != last
        last = stamp
    assert writes <= 3
    context.flush()
    assert run.status().message == "step 200"
    context.progress(1000, 1000, "the end")
    assert run.status().step == 1000


def test_details_are_merged(run: Run) -> None:
    run.update(details={"layer": 3})
    context = JobContext(run)
    context.detail(path="fast")
    assert run.status().details == {"layer": 3, "path": "fast"}


def test_cancel_is_seen(run: Run) -> None:
    context = JobContext(run)
    context.check_cancelled()
    run.request_cancel()
    time.sleep(0.03)
    with pytest.raises(Cancelled):
        context.check_cancelled()


def test_only_one_of_many_takes_a_run(run: Run) -> None:
    took: list[bool] = []
    threads = [
        threading.Thread(target=lambda: took.append(run.transition(("queued",), state="running")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(took) == [False] * 7 + [True]


def test_two_workers_never_work_on_one_run(run: Run) -> None:
    """A worker that stalled and was taken for dead still holds its run; its end frees it."""
    with (
        run.worked_on(),
        pytest.raises(UserError, match="still busy"),
        Run(run.path).worked_on(),
    ):
        pass
    with run.worked_on():
        pass


def test_torn_metrics_line_is_cut(run: Run) -> None:
    run.append_metrics({"kind": "step", "step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    worker._mend(run)
    run.append_metrics({"kind": "step", "step": 2})
    assert [r["step"] for r in run.read_metrics()[0]] == [1, 2]


def test_dead_workers_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    here = socket.gethostname()
    me = Process.current()
    for process, age in (
        (me, 0),
        (Process(here, 2**22 + 1, 1.0), 0),
        (Process("elsewhere", 1, 1.0), 0),
        (Process("silent", 1, 1.0), 3600),
    ):
        facts = {"host": process.host, "pid": process.pid, "started": process.started}
        engine_state.publish_worker({"process": facts, "updated": time.time() - age}, process)
    assert [w["process"]["host"] for w in engine_state.read_workers()] == ["elsewhere", here]
    assert len(list((tmp_path / "engine").iterdir())) == 3


def test_shared_engine_is_private_and_forgotten_when_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    me = engine_state.EngineAddress("tls://127.0.0.1:1", 1, Process.current(), "ca", "cert", "key")
    engine_state.share_engine(me)
    assert engine_state.find_shared_engine() == me
    assert (tmp_path / "engine" / "engine.json").stat().st_mode & 0o077 == 0
    dead = engine_state.EngineAddress(
        "tls://127.0.0.1:1", 1, Process(socket.gethostname(), 2**22 + 1, 1.0), "", "", ""
    )
    engine_state.unshare_engine(dead)
    assert engine_state.find_shared_engine() == me, "only its owner removes it"
    engine_state.share_engine(dead)
    assert engine_state.find_shared_engine() is None


def test_gpu_list() -> None:
    listing = (
        "GPU 0: NVIDIA H200 (UUID: GPU-aaaa)\n"
        "GPU 1: NVIDIA H200 (UUID: GPU-bbbb)\n"
        "  MIG 3g.71gb     Device  0: (UUID: MIG-cccc)\n"
        "  MIG 3g.71gb     Device  1: (UUID: MIG-dddd)\n"
    )
    assert engine.parse_gpu_list(listing) == ["GPU-aaaa", "MIG-cccc", "MIG-dddd"]
    assert engine.parse_gpu_list("No devices found.\n") == []


@pytest.mark.parametrize(
    ("value", "names"), [("", []), ("-1", []), ("2,3", ["2", "3"]), ("0,-1,1", ["0"])]
)
def test_chosen_gpus_are_obeyed(
    monkeypatch: pytest.MonkeyPatch, value: str, names: list[str]
) -> None:
    monkeypatch.setattr(engine, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert engine.visible_gpus() == names


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    specs = engine.worker_specs([f"GPU-{i}" for i in range(8)])
    assert specs["gpu-7"] == {"CUDA_VISIBLE_DEVICES": "GPU-7", "OMP_NUM_THREADS": "16"}
    assert engine.worker_specs([]) == {"cpu": {}}


def test_workers_can_share_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    specs = engine.worker_specs(["GPU-a", "GPU-b"], per_device=4)
    assert list(specs) == [f"gpu-{i}-{k}" for i in range(2) for k in range(4)]
    assert specs["gpu-1-3"] == {"CUDA_VISIBLE_DEVICES": "GPU-b", "OMP_NUM_THREADS": "2"}
    assert engine.worker_specs([], per_device=2)["cpu-1"] == {"OMP_NUM_THREADS": "8"}
