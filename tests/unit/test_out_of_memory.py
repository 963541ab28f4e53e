"""The way down when memory is short: what is given up, in which order, and that the run stays true.

On a CPU the shortage is a stand-in: a block that refuses more than so many tokens, as the allocator
of a GPU would. ``test_refusing_allocator.py`` makes the real one refuse.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit import families
from zo_core import runs
from zo_core.errors import MemoryExhaustedError
from zo_core.failures import describe
from zo_core.jobs import ReplayJob, TuneJob
from zo_core.models import resident
from zo_core.models.load import LoadedModel
from zo_core.progress import Cancelled, JobContext
from zo_core.recipes import evaluations, tune
from zo_core.recipes.replay import run_replay
from zo_core.recipes.tune import run_tune
from zo_core.runs import Run
from zo_core.settings import settings
from zo_core.tasks.templates import Example
from zo_core.zo.checkpoint import read_checkpoint
from zo_core.zo.forward import FastForward
from zo_core.zo.scope import TunedScope

SMALL: dict[str, Any] = {
    **{"batch_size": 4, "steps": 4, "train_examples": 16, "dev_examples": 8, "eval_examples": 8},
    **{"device": "cpu", "eval_every": 2, "lr": 1e-3, "scope": "layer:3"},
}


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tiny random model in place of the bundled one, which would take minutes here."""
    folder = families.save(families.build("llama"), tmp_path_factory.mktemp("llama"))
    SMALL["model"] = str(folder)


def go(job: TuneJob, run: Run | None = None) -> Run:
    """Run a job here, as the worker does."""
    run = run or runs.create(job, None)
    run_tune(job, run, JobContext(run))
    run.update(state="done")
    return run


@contextmanager
def meeting(hook: Callable[[int], None], block: int = -1) -> Iterator[None]:
    """Within, a hook is told how many tokens a block of the model meets, before it runs."""
    blocks = resident.acquire(TuneJob(**SMALL), lambda _line: None).decoder.blocks

    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        hook(hidden.shape[:-1].numel())

    handle = blocks[block].register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def room_for(tokens: int, block: int = -1) -> AbstractContextManager[None]:
    """Within, a block of the model, the last one, refuses more tokens than this."""

    def refuse(met: int) -> None:
        if met > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    return meeting(refuse, block)


@contextmanager
def during_evaluations(within: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Every evaluation has a context of its own."""
    evaluate = evaluations.evaluate

    def watched(*args: Any) -> dict[str, float | int]:
        with within():
            return evaluate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluations, "evaluate", watched)
        yield


def steps_of(run: Run) -> list[dict[str, Any]]:
    """The ledger, without what takes time."""
    records = [r for r in run.read_metrics()[0] if r["kind"] == "step"]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def outcomes_of(run: Run) -> list[dict[str, Any]]:
    """The evaluations, without what takes time."""
    records = [r for r in run.read_metrics()[0] if r["kind"] == "eval"]
    return [{k: v for k, v in r.items() if k != "eval_seconds"} for r in records]


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """True weights and optimizer state of the last step."""
    saved = read_checkpoint(run.path / "checkpoint.safetensors")
    return saved.weights | {f"state/{n}": t for n, t in saved.state.items()}


def same(one: Run, other: Run) -> bool:
    """Whether two runs end at the same bits."""
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def tokens_of_a_step(job: TuneJob) -> int:
    """Most tokens that the last block meets at once, in a run with all the memory it wants."""
    met: list[int] = []
    with meeting(met.append):
        go(job)
    return max(met)


@pytest.mark.parametrize(
    "fields",
    [{}, {"optimizer": "adamm", "accumulate": 2}, {"precision": "inplace"}, {"optimizer": "adamw"}],
    ids=["fast", "accumulate", "inplace", "adamw"],
)
def test_the_batch_is_split_and_the_run_goes_on(fields: dict[str, Any]) -> None:
    """Messages in their order; the ledger of the whole batch, to rounding; resume to the bit."""
    job = TuneJob(**(SMALL | fields))
    whole = go(job)
    room = tokens_of_a_step(job.model_copy(update={"steps": 2})) * 2 // 3
    with room_for(room):
        split = go(job)
        part = runs.create(job, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "append_metrics", _stopping_after(3))
            with pytest.raises(Cancelled):
                go(job, part)
        go(job, part)
    details = split.status().details
    of_steps = [line for line in details["out_of_memory"] if "evaluation" not in line]
    given_up = [line.partition(": ")[2] for line in of_steps if "batch split" in line]
    frees = [line.partition(": ")[2] for line in details["out_of_memory"] if "cache" in line]
    cache = ["prefix cache emptied", "prefix cache moved to host memory"]
    halves = [f"batch split into micro-batches of {n}" for n in (2, 1)]
    assert frees == (cache if details["path"] == "fast" else [])
    assert given_up == halves[: len(given_up)]
    assert details["micro_batch"] in (1, 2)
    log = (split.path / "log.txt").read_text()
    assert all(line in log for line in details["out_of_memory"])
    if job.optimizer != "adamw":
        parts = [[r.get("micro_batches", 1) for r in steps_of(run)] for run in (split, whole)]
        assert max(parts[0]) > max(parts[1])
    for ours, theirs in zip(steps_of(split), steps_of(whole), strict=True):
        assert ours["forward_passes"] == theirs["forward_passes"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for a, b in zip(ours["g"], theirs["g"], strict=True):
            # a float32 rounding of each loss, divided by 2 eps
            assert a == pytest.approx(b, abs=4e-6 * ours["loss"] / (2 * job.eps))
    assert steps_of(part) == steps_of(split)
    assert same(part, split)
    if job.optimizer != "adamw":
        replay = runs.create(ReplayJob(run=split.run_id, device="cpu"), None)
        run_replay(ReplayJob(run=split.run_id, device="cpu"), replay, JobContext(replay))
        answer = replay.result_json()
        assert answer is not None
        assert answer["identical"]


def _stopping_after(step: int) -> Callable[[Run, dict[str, Any]], None]:
    appended = Run.append_metrics

    def append(self: Run, record: dict[str, Any]) -> None:
        appended(self, record)
        if record["kind"] == "step" and record["step"] == step:
            raise Cancelled

    return append


@pytest.mark.parametrize(
    ("begins", "fields"),
    [
        (0, {}),
        (3, {}),
        (3, {"precision": "inplace"}),
        (0, {"optimizer": "adamw", "checkpoint_every": 2}),
    ],
    ids=["before training", "after step 2", "inplace", "adamw"],
)
def test_an_evaluation_splits_its_own_batches(begins: int, fields: dict[str, Any]) -> None:
    """It says so once, for this run and a resumed one; training stays the same to the bit."""
    job = TuneJob(**(SMALL | {"eval_every": 1} | fields))
    met: list[list[int]] = []

    def noted() -> AbstractContextManager[None]:
        met.append([])
        return meeting(met[-1].append, 0)

    with during_evaluations(noted):
        whole = go(job)
    room, calls = min(map(max, met)) - 1, 0

    def shortage() -> AbstractContextManager[None]:
        """From one of the evaluations on; the first block also meets the frozen prefixes."""
        nonlocal calls
        calls += 1
        return room_for(room, 0) if calls > begins else nullcontext()

    with during_evaluations(shortage):
        split = go(job)
        calls, part = 0, runs.create(job, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "append_metrics", _stopping_after(3))
            with pytest.raises(Cancelled):
                go(job, part)
        calls = begins
        go(job, part)
    for run in (split, part):
        assert steps_of(run) == steps_of(whole)
        assert same(run, whole)
        said, log = run.status().details["out_of_memory"], (run.path / "log.txt").read_text()
        assert said == split.status().details["out_of_memory"]
        when = f"out of memory in an evaluation at step {2 if begins else 0}: "
        assert all(line.startswith(when) for line in said)
        assert said[-1] == f"{when}batch split into micro-batches of 2"
        assert all(log.count(line) == 1 for line in said)
        assert run.status().details["eval_micro_batch"] == 2
        assert "micro_batch" not in run.status().details
        for ours, theirs in zip(outcomes_of(run), outcomes_of(whole), strict=True):
            assert ours.pop("eval_forward_passes") >= theirs.pop("eval_forward_passes")
            assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-5)
            assert ours == theirs
    assert outcomes_of(part) == outcomes_of(split)


def test_a_step_that_splits_leaves_the_evaluations_whole() -> None:
    """Each has its own micro-batch: dev losses before and after the split are comparable."""
    job = TuneJob(**SMALL)
    whole = go(job)
    with pytest.MonkeyPatch.context() as patch:
        train = tune.train

        def short(*args: Any) -> None:
            if args[-1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            train(*args)

        patch.setattr(tune, "train", short)
        split = go(job)
    assert split.status().details["micro_batch"] == 2
    assert "eval_micro_batch" not in split.status().details
    passes = [r["eval_forward_passes"] for r in outcomes_of(split)]
    assert passes == [r["eval_forward_passes"] for r in outcomes_of(whole)]


def test_an_evaluation_is_not_lost_with_the_step_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Out of memory between a step and its evaluation: both are there in the end, once."""
    job = TuneJob(**(SMALL | {"checkpoint_every": 2}))
    whole = go(job)
    save, saves = tune.save_checkpoint, 0

    def refuse(*args: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        save(*args)

    monkeypatch.setattr(tune, "save_checkpoint", refuse)
    broken = go(job)
    assert outcomes_of(broken) == outcomes_of(whole)
    assert steps_of(broken) == steps_of(whole)
    assert same(broken, whole)


@pytest.mark.parametrize("optimizer", ["zo-sgd", "momentum", "adamw"])
def test_an_update_that_breaks_off_is_undone(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some weights had moved already: they come back from checkpoint and ledger, bit for bit."""
    fields = SMALL | {"optimizer": optimizer, "checkpoint_every": 2, "steps": 5}
    job = TuneJob(**fields)
    whole = go(job)
    updates, step = 0, TunedScope._step

    def break_off(self: TunedScope, *args: Any) -> None:
        nonlocal updates
        updates += 1
        if updates == 2 * len(self.parameters) + 3:  # amid the third step
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(self, *args)

    monkeypatch.setattr(TunedScope, "_step", break_off)
    broken = go(job)
    (said,) = broken.status().details["out_of_memory"]
    given_up = "batch split into micro-batches of 2" if optimizer == "adamw" else "cache emptied"
    assert "out of memory at step 3: " in said
    assert said.endswith(given_up)
    if optimizer != "adamw":  # whose batches were split
        assert steps_of(broken) == steps_of(whole)
        assert same(broken, whole)
    assert [r["step"] for r in steps_of(broken)] == [1, 2, 3, 4, 5]


def test_a_cancel_on_the_way_back_keeps_the_right_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a step half replayed are no checkpoint: the resumed run ends at the same bits."""
    job = TuneJob(**(SMALL | {"steps": 6, "eval_every": 0}))
    whole = go(job)
    calls, report, step = 0, JobContext.progress, TunedScope._step

    def breaks(scope: TunedScope, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4 * len(scope.parameters) + 1:  # in the update of step 5
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(scope, *args)

    def cancels(context: JobContext, at: int, total: int, message: str) -> None:
        if message == "replaying step 2":
            raise Cancelled
        report(context, at, total, message)

    part = runs.create(job, None)
    with monkeypatch.context() as patch:
        patch.setattr(TunedScope, "_step", breaks)
        patch.setattr(JobContext, "progress", cancels)
        with pytest.raises(Cancelled):
            go(job, part)
    go(job, part)
    assert same(whole, part)
    assert steps_of(whole) == steps_of(part)


def test_one_example_that_does_not_fit_ends_the_run() -> None:
    """With one sentence; what was reached is kept."""
    run = runs.create(TuneJob(**SMALL), None)
    with room_for(3), pytest.raises(MemoryExhaustedError, match="one example") as caught:
        go(TuneJob(**SMALL), run)
    said = run.status().details["out_of_memory"]
    assert said[-1].endswith("micro-batches of 1")
    assert "\n" not in str(caught.value)
    failure = describe(caught.value)
    assert failure.out_of_memory
    assert failure.expected


def test_the_cache_holds_the_same_bits_wherever_it_lives(
    demo: LoadedModel, review_examples: list[Example]
) -> None:
    """Emptied, moved, made anew: the hidden states of a batch are the same."""
    forward = FastForward(demo, 5)
    assert forward.give_up() is None
    forward.register(review_examples)
    batch = review_examples[3:9]
    wanted = forward.prepare(batch).hidden
    assert wanted is not None
    cached = forward._frozen._cache
    assert forward.give_up() == "prefix cache emptied"
    assert not cached
    for _ in range(2):
        assert torch.equal(forward.prepare(batch).hidden, wanted)  # type: ignore[arg-type]
        forward.give_up()
    assert all(t.device.type == "cpu" for t in forward._frozen._cache.values())
    assert len(forward._frozen._cache) > len(batch)
    assert forward.give_up() is None
