"""A tuning run that is stopped in any way and resumed ends with the bits of one that never was."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import until
from tests.integration.conftest import Answer, CommandLine
from zo_core.runs import Run

pytestmark = pytest.mark.timeout(300)
STEPS, CHECKPOINT_EVERY = 120, 25
"""Four seconds of steps: whoever kills a run half way may be held up himself."""
SPEC: tuple[object, ...] = (
    *("--task", "reviews", "--scope", "layer:13", "--steps", STEPS, "--batch-size", 4),
    *("--train-examples", 64, "--dev-examples", 10, "--eval-examples", 20, "--eval-every", 30),
    *("--weight-decay", 0.01, "--checkpoint-every", CHECKPOINT_EVERY, "--seed", 7),
)
FULL: tuple[object, ...] = (
    *("--scope", "full", "--noise", "rademacher", "--steps", 6, "--batch-size", 2, "--lr", 1e-5),
    *("--train-examples", 16, "--eval-examples", 4, "--eval-every", 0, "--checkpoint-every", 2),
)
CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
TIMES = {"seconds", "eval_seconds"}
"""What may differ in a ledger: how long it took."""


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [r for r in run.read_metrics()[0] if r["kind"] == "step"]


def has_steps(count: int) -> Callable[[Run], bool]:
    return lambda run: len(steps_of(run)) >= count


def has_begun(run: Run) -> bool:
    """A worker has taken it and not finished loading or evaluating."""
    return run.status().state == "running"


def assert_same_tensors(file: Path, other: Path) -> None:
    """The same bits under the same names, of the same step."""
    ours, theirs = load_file(file), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float32
        # Of the bits: == takes 0.0 and -0.0 for equal.
        assert torch.equal(ours[name].view(torch.int32), tensor.view(torch.int32)), name
    with safe_open(file, "pt") as a, safe_open(other, "pt") as b:
        assert a.metadata() == b.metadata()


def assert_same_outcome(run: Run, uninterrupted: Run) -> None:
    """The same tensors, ledger, evaluations and summary."""
    for file in (CHECKPOINT, BEST):
        assert (run.path / file).exists() == (uninterrupted.path / file).exists()
        if (run.path / file).exists():
            assert_same_tensors(run.path / file, uninterrupted.path / file)
    ledgers = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in x.read_metrics()[0]]
        for x in (run, uninterrupted)
    ]
    assert ledgers[0] == ledgers[1]
    results = [x.result_json() or {} for x in (run, uninterrupted)]
    for name in ("before", "after", "best_step", "forward_passes", "eval_forward_passes", "layer"):
        assert results[0][name] == results[1][name], name


def start(cli: CommandLine, *arguments: object) -> tuple["subprocess.Popen[str]", Run]:
    """Begin a tuning command and find its run."""
    known = cli.ids()
    process = cli.start("tune", *arguments, "--json")
    until(lambda: (cli.ids() - known) or process.poll() is not None, 90)
    (run_id,) = cli.ids() - known
    run = cli.run(run_id)
    until((run.path / "status.json").is_file, 10)
    return process, run


def kill_worker(run: Run) -> int:
    """Kill the worker process that has the run, as the kernel would for want of memory."""
    status = run.status()
    assert status.live, (status, run.log_text())
    process = status.process
    assert process is not None
    assert process.pid != os.getpid()
    os.kill(process.pid, signal.SIGKILL)
    return process.pid


def stop(cli: CommandLine, arguments: tuple[object, ...], when: Callable[[Run], bool]) -> Run:
    """A run whose worker is killed at the given moment."""
    command, run = start(cli, *arguments)
    until(lambda: when(run) or not run.status().live, 120)
    kill_worker(run)
    answer = cli.end(command).expect(1)
    assert answer.json["state"] == run.status().state == "interrupted"
    assert answer.json["run_id"] == run.run_id
    if run.status().step:
        assert f"tune --resume {run.run_id}" in answer.err
    return run


def resume(cli: CommandLine, run: Run) -> Answer:
    answer = cli("tune", "--resume", run.run_id, "--json").expect(0)
    assert answer.json["run_id"] == run.run_id
    assert run.status().state == "done"
    return answer


@pytest.fixture(scope="module")
def uninterrupted(cli: CommandLine) -> Run:
    """The run of the spec that nothing happens to."""
    return cli.run(cli("tune", *SPEC, "--json").expect(0).json["run_id"])


def test_same_spec_gives_the_same_bits(cli: CommandLine, uninterrupted: Run) -> None:
    again = cli.run(cli("tune", *SPEC, "--json").expect(0).json["run_id"])
    assert_same_outcome(again, uninterrupted)


def test_killed_after_a_checkpoint(cli: CommandLine, uninterrupted: Run) -> None:
    run = stop(cli, SPEC, has_steps(CHECKPOINT_EVERY + 3))
    assert len(steps_of(run)) < STEPS
    with safe_open(run.path / CHECKPOINT, "pt") as file:
        assert int(file.metadata()["step"]) % CHECKPOINT_EVERY == 0, "no more than it had saved"
    resume(cli, run)
    assert_same_outcome(run, uninterrupted)


def test_killed_before_the_first_checkpoint(cli: CommandLine, uninterrupted: Run) -> None:
    run = stop(cli, SPEC, has_steps(2))
    assert steps_of(run)
    assert not (run.path / CHECKPOINT).exists()
    resume(cli, run)
    assert "Resuming after step" in run.log_text()
    assert_same_outcome(run, uninterrupted)


def test_killed_before_the_first_step_and_again_later(cli: CommandLine, uninterrupted: Run) -> None:
    run = stop(cli, SPEC, has_begun)
    assert not steps_of(run)
    command = cli.start("tune", "--resume", run.run_id, "--json")
    until(lambda: has_steps(10)(run) or command.poll() is not None, 120)
    kill_worker(run)
    cli.end(command).expect(1)
    resume(cli, run)
    assert_same_outcome(run, uninterrupted)


def test_cancelled_and_resumed(cli: CommandLine, uninterrupted: Run) -> None:
    command, run = start(cli, *SPEC)
    until(lambda: has_steps(CHECKPOINT_EVERY + 2)(run) or not run.status().live, 120)
    command.send_signal(signal.SIGINT)  # `runs cancel` may take longer to start than the run takes
    answer = cli.end(command).expect(130)
    assert answer.json["state"] == run.status().state == "cancelled"
    stopped_at = len(steps_of(run))
    assert CHECKPOINT_EVERY < stopped_at < STEPS
    with safe_open(run.path / CHECKPOINT, "pt") as file:
        assert int(file.metadata()["step"]) == stopped_at, "a cancel saves where it stopped"
    resume(cli, run)
    assert_same_outcome(run, uninterrupted)
    assert "is done" in cli("tune", "--resume", run.run_id, "--json").expect(2).json["error"]


def test_full_model_scope(cli: CommandLine) -> None:
    reference = cli.run(cli("tune", *FULL, "--json").expect(0).json["run_id"])
    run = stop(cli, FULL, has_steps(3))
    resume(cli, run)
    assert_same_outcome(run, reference)


def test_command_line_killed_with_its_own_engine(
    cli: CommandLine, uninterrupted: Run, tmp_path: Path
) -> None:
    """As when the app dies: its engine goes with it, the run says so and resumes elsewhere."""
    alone = CommandLine(tmp_path)
    command, run = start(alone, *SPEC)
    until(lambda: has_steps(8)(run) or not run.status().live, 120)
    family = psutil.Process(command.pid).children(recursive=True)
    assert len(family) >= 2, "an engine and a worker"
    command.kill()
    command.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "processes outlive the command"
    assert run.status().state == "interrupted"
    listed = alone("runs", "list", "--json").expect(0).json["runs"]
    assert [(row["run_id"], row["state"]) for row in listed] == [(run.run_id, "interrupted")]
    resume(alone, run)
    assert_same_outcome(run, uninterrupted)
