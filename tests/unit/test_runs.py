"""The run store: ids, atomic files, torn lines, interrupted runs, deleting and exporting."""

import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_core import runs
from zo_core.jobs import LoadJob, ProbeJob, ScanJob, TuneJob
from zo_core.runs import LIVE, Process, Run, RunNotFoundError, Status, replace_file, to_json
from zo_core.settings import settings

DEAD = Process(socket.gethostname(), 2**22 + 1, 1.0)
"""A process of this host that cannot exist: its pid is over the kernel's limit."""
ELSEWHERE = Process("another-host", 1, 1.0)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run store of its own."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def run() -> Run:
    """A queued tuning run of this process."""
    return runs.create(TuneJob(), Process.current())


def running(run: Run, process: Process | None, heartbeat_age: float | None = 0.0) -> Run:
    """The run, made to look as if it ran in a process with a heartbeat of some age."""
    now = time.time()
    run.update(state="running", started=now - 1, process=process)
    if heartbeat_age is not None:
        run.beat()
        os.utime(run.path / "heartbeat", (now - heartbeat_age,) * 2)
    return run


# -- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run_id",
    [
        "",
        ".",
        "..",
        "../runs",
        "../../etc/passwd",
        "/etc/passwd",
        "20250101-000000-tune-abcdef/../../x",
        "20250101-000000-tune-abcdef\n",
        "20250101-000000-tune-abcdef\0",
        "20250101-000000-TUNE-abcdef",
        "20250101-000000-tune-ABCDEF",
        "x" * 5000,
        "20250101-000000-tune-abcdef",
    ],
)
def test_malformed_and_unknown_ids_are_refused(run_id: str, store: Path) -> None:
    with pytest.raises(RunNotFoundError, match="runs list"):
        runs.get(run_id)


def test_well_formed_folder_outside_the_store_is_out_of_reach(run: Run, tmp_path: Path) -> None:
    outside = tmp_path / run.run_id
    run.path.rename(outside)
    for run_id in (run.run_id, f"../{run.run_id}", str(outside)):
        with pytest.raises(RunNotFoundError):
            runs.get(run_id)


@given(st.text(max_size=60))
def test_no_text_reaches_the_disk_as_a_path(run_id: str) -> None:
    with pytest.raises(RunNotFoundError):
        runs.get(run_id)


def test_created_run_is_found_and_listed_newest_first(store: Path) -> None:
    made = []
    for job in (ScanJob(), ProbeJob(), TuneJob(), LoadJob()):
        made.append(runs.create(job, None))
        assert runs.RUN_ID.match(made[-1].run_id)
        assert runs.get(made[-1].run_id).job == job
    assert len({r.run_id for r in made}) == 4
    (store / "notes").mkdir()
    (store / "20250101-000000-tune-abcdef").mkdir()  # no status: no run
    (store / "20250101-000000-tune-abcdee").write_text("a file")
    listed = [r.run_id for r in runs.list_runs()]
    assert listed == sorted((r.run_id for r in made[:3]), reverse=True)
    assert [r.run_id for r in runs.list_runs(("load",))] == [made[3].run_id]


def test_empty_store_lists_nothing(store: Path) -> None:
    assert list(runs.list_runs()) == []
    assert not store.exists(), "reading makes no folders"


# -- status ------------------------------------------------------------------------------------


def test_status_keeps_what_was_written(run: Run) -> None:
    changed = run.update(state="running", step=3, total=9, details={"layer": 1}, process=ELSEWHERE)
    run.beat()
    assert run.status() == changed
    assert Status.from_json(to_json(asdict(changed))) == changed


def test_unknown_keys_of_a_later_version_are_ignored(run: Run) -> None:
    path = run.path / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mood": "good"}))
    assert run.status().state == "queued"


def test_readers_see_whole_statuses_while_it_is_replaced(run: Run) -> None:
    """Many replacements, with two readers: never a part, never a moment without a file."""
    done = threading.Event()
    seen: list[int] = []
    errors: list[Exception] = []

    def read() -> None:
        while not done.is_set():
            try:
                status = Status.from_json((run.path / "status.json").read_text())
                assert status.message == str(status.step) * 500
                seen.append(status.step)
            except Exception as error:
                errors.append(error)
                return

    run.update(step=0, message="0" * 500)
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(1, 200):
        run.update(step=step, message=str(step) * 500)
    done.set()
    for reader in readers:
        reader.join()
    assert not errors
    assert len(set(seen)) > 5
    assert not list(run.path.glob(".status.json.*")), "no temporary file is left"


def test_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "table"
    target.mkdir()  # replacing a folder by a file fails after the temporary file is written
    with pytest.raises(OSError, match="table"):
        replace_file(target, "new")
    assert list(tmp_path.glob(".table.*")) == []
    assert target.is_dir()


def test_updates_of_two_processes_are_not_lost(run: Run) -> None:
    code = (
        "import sys; from pathlib import Path; from zo_core.runs import Run\n"
        "run = Run(Path(sys.argv[1]))\n"
        "for _ in range(100): run.update(step=run.status().step, total=7)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run.path)], cwd=Path.cwd())
    for number in range(100):
        run.update(message=str(number))
        time.sleep(0.005)
    assert other.wait(60) == 0
    status = run.status()
    assert (status.message, status.total) == ("99", 7)


# -- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("state", LIVE)
def test_dead_process_means_interrupted(run: Run, state: runs.State) -> None:
    running(run, DEAD)
    run.update(state=state)
    status = run.status()
    assert status.state == "interrupted"
    assert status.message == (
        "The engine stopped before this run began."
        if state == "queued"
        else "The engine stopped before it finished."
    )
    assert run.stored_state() == state, "reading changes nothing"


def test_a_pid_that_was_given_to_another_process_is_dead(run: Run) -> None:
    me = Process.current()
    assert running(run, me).status().state == "running"
    assert running(run, Process(me.host, me.pid, me.started - 60)).status().state == "interrupted"


def test_work_of_a_resumed_run_counts_from_its_first_start(run: Run) -> None:
    """Without the time between; of a worker that died, up to its last sign of life."""
    assert run.seconds_of_work(run.status()) is None, "it waits"
    run.update(state="cancelled", started=1000.0, finished=1060.0)
    assert run.seconds_of_work(run.status()) == 60
    run.update(state="queued", started=None, finished=None, worked=60.0)
    assert run.seconds_of_work(run.status()) == 60
    running(run, DEAD, heartbeat_age=0.0)
    started = time.time() - 40
    run.update(started=started)
    os.utime(run.path / "heartbeat", (started + 30,) * 2)
    assert run.seconds_of_work(run.status()) == pytest.approx(90, abs=0.01)


@pytest.mark.parametrize("process", [ELSEWHERE, None])
def test_stale_heartbeat_means_interrupted(run: Run, process: Process | None) -> None:
    limit = settings().heartbeat_timeout
    assert running(run, process, heartbeat_age=limit - 5).status().state == "running"
    assert running(run, process, heartbeat_age=limit + 5).status().state == "interrupted"


def test_queued_run_of_a_remote_engine_may_wait_for_ever(run: Run) -> None:
    run.update(process=None, created=time.time() - 1e6)
    assert run.status().state == "queued"


def test_run_without_a_first_heartbeat(run: Run) -> None:
    running(run, ELSEWHERE, heartbeat_age=None)
    assert run.status().state == "running"
    run.update(started=time.time() - settings().heartbeat_timeout - 5)
    assert run.status().state == "interrupted"


@pytest.mark.parametrize("state", ["done", "failed", "cancelled", "interrupted"])
def test_ended_runs_stay_as_they_ended(run: Run, state: runs.State) -> None:
    running(run, DEAD, heartbeat_age=1e6)
    run.update(state=state)
    assert run.status().state == state


def test_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    import psutil

    process = Process(socket.gethostname(), child.pid, psutil.Process(child.pid).create_time())
    assert not process.is_dead()
    child.stdin.close()
    end = time.monotonic() + 20
    while not process.is_dead() and time.monotonic() < end:
        time.sleep(0.02)  # it has ended, and nobody has waited for it yet
    assert process.is_dead()
    child.wait()
    assert process.is_dead()


# -- metrics -----------------------------------------------------------------------------------

records = st.lists(
    st.dictionaries(
        st.text(max_size=8),
        st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.floats(),
        max_size=4,
    ),
    max_size=12,
)


def same(a: object, b: object) -> bool:
    """Equal, where NaN and the infinities have become null."""
    if isinstance(a, float) and not math.isfinite(a):
        return b is None
    return a == b


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run folder with nothing but metrics."""
    return Run(tmp_path_factory.mktemp("ledger"))


@given(records, st.data())
def test_metrics_come_back_exactly_from_any_offset(
    ledger: Run, written: list[dict[str, object]], data: st.DataObject
) -> None:
    (ledger.path / "metrics.jsonl").unlink(missing_ok=True)
    cut = data.draw(st.integers(0, len(written)))
    for record in written[:cut]:
        ledger.append_metrics(record)
    first, offset = ledger.read_metrics()
    for record in written[cut:]:
        ledger.append_metrics(record)
    second, end = ledger.read_metrics(offset)
    assert len(first + second) == len(written)
    for got, wanted in zip(first + second, written, strict=True):
        assert got.keys() == wanted.keys()
        assert all(same(wanted[k], got[k]) for k in wanted)
    assert ledger.read_metrics(end) == ([], end)


def test_half_a_line_waits_for_its_end(run: Run) -> None:
    run.append_metrics({"step": 1})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step"')
        file.flush()
        read, offset = run.read_metrics()
        assert read == [{"step": 1}]
        file.write(b": 2}\n")
    assert run.read_metrics(offset)[0] == [{"step": 2}]


@pytest.mark.parametrize(
    "torn",
    [
        b'{"step": 2, "g": [0.1',
        b"",
        b"\0" * 7,
        '{"text": "é'.encode()[:-1],
    ],
)
def test_torn_line_is_skipped(run: Run, torn: bytes) -> None:
    run.append_metrics({"step": 1})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(torn + b"\n")
    run.append_metrics({"step": 3})
    assert run.read_metrics()[0] == [{"step": 1}, {"step": 3}]


def test_no_metrics_yet(run: Run) -> None:
    assert run.read_metrics() == ([], 0)


def test_not_a_number_becomes_null() -> None:
    value = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": (math.nan,)}, 3: Path("x")}
    text = to_json(value)
    assert "\n" not in text
    assert json.loads(text) == {"a": None, "b": [None, None, 1.5], "c": {"d": [None]}, "3": "x"}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_to_the_bit(value: float) -> None:
    assert json.loads(to_json({"g": [value]}))["g"] == [value]


# -- delete and export -------------------------------------------------------------------------


@pytest.mark.parametrize("state", LIVE)
def test_live_runs_are_not_deleted(run: Run, state: runs.State) -> None:
    running(run, Process.current())
    run.update(state=state)
    with pytest.raises(RuntimeError, match="still live: cancel it"):
        run.delete()
    assert run.status().state == state


def test_ended_and_interrupted_runs_are_deleted(run: Run, store: Path) -> None:
    running(run, DEAD)
    run.delete()
    assert not run.path.exists()
    assert store.is_dir()
    other = runs.create(TuneJob(), None)
    other.update(state="done")
    other.delete()
    assert list(runs.list_runs()) == []


def test_zip_has_every_file_and_no_hidden_one(run: Run) -> None:
    run.append_metrics({"step": 1})
    run.write_result("summary.json", "{}")
    run.write_result("layers.csv", "layer\n")
    run.log("said something")
    assert (run.path / ".reserve").stat().st_size == runs.RESERVE
    with zipfile.ZipFile(io.BytesIO(run.zip_bytes())) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        content = archive.read(f"{run.run_id}/metrics.jsonl")
    files = ["job.json", "status.json", "metrics.jsonl", "log.txt"]
    files += ["results/summary.json", "results/layers.csv"]
    assert names == {f"{run.run_id}/{name}" for name in files}
    assert content == (run.path / "metrics.jsonl").read_bytes()


def test_results_that_are_not_there_yet(run: Run) -> None:
    assert run.result_json() is None
    assert run.log_text() == ""
    run.write_result("summary.json", "{half")
    assert run.result_json() is None
