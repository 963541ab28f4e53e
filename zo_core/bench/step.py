"""One ZO step: MeZO as published, the naive dominant layer, and ours, side by side in one process.

Where the GPU can, ours also runs with its suffix in fp8 (``suffix`` of a job), later and alone.

The arms take turns on the same batches, so that a change of the machine's clock meets all of them.
Times are of whole steps, perturbation, update and host work included: the clock runs from one
synchronisation with the device to the next. Ours is the training loop itself, ledger included: its
time is that of some rounds of batches, divided. Beside it stands the floor: the matrix products of
the blocks from the tuned one up for all tokens of the same batches, of which ours leaves out most
of the last block's, and of the head at the scored places. It takes its turn, as many times in a row
as our steps: at its power limit a GPU is slower than in its first milliseconds.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zo_core.bench.floor import ProductFloor
from zo_core.bench.mezo import PublishedMezo
from zo_core.bench.phases import our_phases
from zo_core.bench.shapes import build, examples
from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.models.load import LoadedModel
from zo_core.models.memory import tuning
from zo_core.provenance import provenance
from zo_core.tasks.templates import Example
from zo_core.zo.forward import FastForward
from zo_core.zo.packing import pack, shared_start
from zo_core.zo.path import FP8_DRAWS, choose_forward
from zo_core.zo.rounding import fp8_error
from zo_core.zo.scope import Draw, TunedScope, scope_parameters
from zo_core.zo.trainer import Progress, batch_indices, make_optimizer, train

BATCH, BATCHES = 16, 8
EPS, LR = 1e-3, 1e-9
"""The learning rate is too small to move a weight: random models must not run away."""
STEPS_OF_A_RUN = 10_000
"""What a run of the paper's length sets up, so does ours."""
FIRST_STEP = 200
"""Steps before it count now and then how many weights they change; those that follow do not."""
ROUNDS = {"cuda": 6, "cpu": 2}
IN_A_ROW = 0.3
"""Seconds of steps that ours takes in a row at least: what begins and ends a run is once a run."""
PASSES = 3
"""Times over the batches in a row at most, and while ours warms up."""
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}
"""Dense bf16 operations a second, NVIDIA's data sheets."""


@dataclass(frozen=True, slots=True)
class ArmTime:
    """How long a step of an arm takes, in milliseconds."""

    median: float
    low: float
    high: float
    phases: dict[str, float]
    """By phase, measured apart, with a synchronisation after each."""
    peak_bytes: int | None
    """Device memory at its highest, weights included."""
    expected_bytes: int | None = None
    """What :mod:`zo_core.models.memory` expects of it; for ours, on a GPU."""


@dataclass(frozen=True, slots=True)
class TaskTimes:
    """One task's row of the table."""

    task: str
    rows: str
    tokens: float
    """Real tokens a batch, mean; what rows begin with alike counts once."""
    padded: float
    """Tokens a batch of MeZO's, rows x width."""
    mezo: ArmTime
    naive: ArmTime
    ours: ArmTime
    fp8: ArmTime | None
    """Ours with an fp8 suffix; None where there is none."""
    fp8_error: tuple[float, float] | None
    """Error of g in the model's own arithmetic and with the fp8 suffix; see
    :func:`zo_core.zo.rounding.fp8_error`."""
    path: str
    floor: float
    """Milliseconds of the matrix products with weights alone: blocks from the tuned one up and
    the head at the scored places, both points."""
    flops: float
    """Floating-point operations of those products."""

    def as_dict(self, peak: float | None) -> dict[str, Any]:
        """Everything, with the ratios that the targets speak of."""
        return asdict(self) | {
            "speedup": self.mezo.median / self.ours.median,
            "speedup_naive": self.mezo.median / self.naive.median,
            "speedup_fp8": self.mezo.median / self.fp8.median if self.fp8 else None,
            "over_floor": self.ours.median / self.floor,
            "utilisation": self.flops / (self.ours.median / 1e3) / peak if peak else None,
        }


class Clock:
    """Phases of a step, each from one synchronisation to the next."""

    def __init__(self, device: torch.device) -> None:
        """Start now."""
        self._device = device
        self.phases: dict[str, float] = {}
        self._last = self.now()

    def now(self) -> float:
        """Milliseconds, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() * 1e3

    def mark(self, phase: str) -> None:
        """The phase that began at the last mark ends here."""
        now = self.now()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now


def run_step_bench(
    shape: str,
    tasks: Sequence[str],
    data_dir: Path | None = None,
    layer: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    say: Callable[[str], None] = lambda _line: None,
    fp8: bool = True,
    keep: Callable[[dict[str, Any]], None] = lambda _result: None,
) -> dict[str, Any]:
    """Time the arms on every task.

    Args:
        shape: a key of :data:`zo_core.bench.shapes.SHAPES`.
        tasks: task names.
        data_dir: local rows; where they are absent, lengths are drawn.
        layer: the tuned layer; None: the shape's own.
        device: see :class:`~zo_core.jobs.ModelFields`.
        dtype: likewise.
        say: receives a line for every task.
        fp8: run ours with an fp8 suffix as well, where the GPU can.
        keep: receives the result so far after every task: a run of all takes minutes.

    Returns:
        ``shape, layer, batch, tasks`` (:meth:`TaskTimes.as_dict`), ``short`` (tasks that memory was
        too short for) and ``provenance``.

    Raises:
        UserError: an unknown shape, task or layer, or memory is too short for every task.
    """
    loaded, own = build(shape, device, dtype)
    layer = own if layer is None else layer
    if not 0 <= layer < len(loaded.decoder):
        last = len(loaded.decoder) - 1
        raise UserError(f"layer: {layer} is out of range: {shape} has layers 0 to {last}.")
    facts = provenance(loaded)
    peak = PEAK_FLOPS.get(facts["device_name"])
    found: list[dict[str, Any]] = []
    short: list[str] = []
    result = {"shape": shape, "layer": layer, "batch": BATCH}
    result |= {"tasks": found, "short": short, "provenance": facts}
    for task in tasks:
        say(f"{shape}, layer {layer}: {task}")
        rows, source = examples(task, loaded, BATCH * BATCHES, data_dir)
        bench = _TaskBench(loaded, layer, task, rows)
        times = _unless_short(partial(bench.run, source, fp8))
        if times is None:
            say(f"{task}: memory is too short for all arms side by side: left out")
            short.append(task)
        else:
            found.append(times.as_dict(peak))
        if found:
            keep(result)
    if not found:
        raise UserError(f"shape: {shape} and the published step need more memory than is here.")
    return result


def _unless_short(run: Callable[[], TaskTimes]) -> TaskTimes | None:
    """What a run finds; None if it runs out of memory, which is then free again."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # once this is left, nothing holds the frames of the run
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _tokens(batch: Sequence[Example]) -> int:
    """Tokens of a batch as our path packs it."""
    rows = [e.rows for e in batch]
    return pack(rows, torch.device("cpu"), shared_start(rows))[2].tokens


class _TaskBench:
    """The arms on the batches of one task."""

    def __init__(self, loaded: LoadedModel, layer: int, task: str, rows: Sequence[Example]) -> None:
        self._loaded, self._layer, self._task, self._rows = loaded, layer, task, rows
        steps = range(FIRST_STEP + 1, FIRST_STEP + 1 + max(1, len(rows) // BATCH))
        self._batches = [
            [rows[i] for i in batch_indices(0, step, len(rows), BATCH)] for step in steps
        ]
        self._kind = loaded.device.type
        self._passes = PASSES
        self._job = TuneJob(scope=f"layer:{layer}", steps=STEPS_OF_A_RUN, eps=EPS, lr=LR)

    def run(self, source: str, fp8: bool) -> TaskTimes:
        loaded, rounds = self._loaded, ROUNDS[self._kind]
        block = loaded.decoder.blocks[self._layer]
        arms = {
            "mezo": PublishedMezo(loaded, list(loaded.model.parameters()), EPS, LR),
            "naive": PublishedMezo(loaded, list(block.parameters()), EPS, LR),
        }
        peaks = {n: self._peak(partial(self._published, arm, 0)) for n, arm in arms.items()}
        tokens = [_tokens(batch) for batch in self._batches]
        scope = TunedScope(scope_parameters(loaded, self._layer))
        error = None
        try:
            fast, path = self._path(scope, "model")
            peaks["ours"] = self._warm_up(fast, scope)
            floor = self._floor(fast, tokens)
            flops = floor.flops
            times: dict[str, list[float]] = {name: [] for name in (*peaks, "floor")}
            for number in range(rounds):
                for name, arm in arms.items():
                    times[name].append(self._published(arm, number))
                times["ours"].append(self._ours(fast, scope))
                times["floor"].append(self._products(floor))
            phases = {name: self._published_phases(arm) for name, arm in arms.items()}
            phases["ours"] = our_phases(loaded, fast, scope, self._batches[0], self._layer, EPS)
            del fast, floor  # with their tensors: the next arm's memory is its own
            gc.collect()
            if fp8:
                with suppress(UserError, torch.OutOfMemoryError):  # there need be no such arm
                    fast, _ = self._path(scope, "fp8")
                    draws = [Draw("gaussian", 0, step) for step in range(1, FP8_DRAWS + 1)]
                    error = fp8_error(loaded, fast, scope, self._rows[:4], draws, EPS)
                    peaks["fp8"] = self._warm_up(fast, scope)
                    eight = [self._ours(fast, scope) for _ in range(rounds)]
                    phases["fp8"] = our_phases(
                        loaded, fast, scope, self._batches[0], self._layer, EPS
                    )
                    times["fp8"] = eight
        finally:
            scope.close()
        padded = [arms["mezo"].prepare(b).input_ids.numel() for b in self._batches]

        def summary(name: str) -> ArmTime:
            values = times[name]
            return ArmTime(
                *(statistics.median(values), min(values), max(values)),
                *(phases[name], peaks[name]),
                None if name in arms else self._expected(name == "fp8"),
            )

        return TaskTimes(
            task=self._task,
            rows=source,
            tokens=statistics.fmean(tokens),
            padded=statistics.fmean(padded),
            mezo=summary("mezo"),
            naive=summary("naive"),
            ours=summary("ours"),
            fp8=summary("fp8") if "fp8" in times else None,
            fp8_error=error,
            path=path,
            floor=statistics.median(times["floor"]),
            flops=flops,
        )

    def _path(self, scope: TunedScope, suffix: str) -> tuple[FastForward, str]:
        """The fast path as a run of the paper's length takes it, and the reason in words."""
        fast, reason = choose_forward(
            *(self._loaded, "auto", self._layer, self._rows[:2]),
            steps=STEPS_OF_A_RUN,
            tuned=scope.parameters,
            suffix=suffix,
        )
        assert isinstance(fast, FastForward), reason
        fast.register(self._rows)
        return fast, reason

    def _warm_up(self, fast: FastForward, scope: TunedScope) -> int | None:
        """Compile, capture and fill the cache; the peak of device memory until then."""
        self._passes = PASSES
        seconds = 0.0

        def run() -> None:
            nonlocal seconds
            for _ in range(2):
                seconds = self._ours(fast, scope) / 1e3 * len(self._batches)

        peak = self._peak(run)
        self._passes = min(PASSES, math.ceil(IN_A_ROW / seconds))
        return peak

    def _expected(self, eight: bool) -> int | None:
        if self._kind != "cuda":
            return None
        counts = [[_tokens([e]) for e in batch] for batch in self._batches]
        need = tuning(
            self._loaded.info,
            self._loaded.dtype_name,
            self._loaded.info.layer_parameters,
            rows=BATCH,
            tokens=max(map(sum, counts)) // BATCH,
            cached_tokens=sum(map(sum, counts)) if self._layer else 0,
            device_bytes=torch.cuda.get_device_properties(self._loaded.device).total_memory,
            fp8=eight,
        )
        return need.total

    def _published(self, arm: PublishedMezo, number: int) -> float:
        """Milliseconds of one step; the weights stay where and what they were."""
        batch = self._batches[number % len(self._batches)]
        clock = Clock(self._loaded.device)
        with arm.undone():
            began = clock.now()
            arm.step(arm.prepare(batch), number)
            return clock.now() - began

    def _published_phases(self, arm: PublishedMezo) -> dict[str, float]:
        batch = arm.prepare(self._batches[0])
        with arm.undone():
            clock = Clock(self._loaded.device)
            arm.step(batch, 0, clock.mark)
        return clock.phases

    def _ours(self, fast: FastForward, scope: TunedScope) -> float:
        """Milliseconds a step of the training loop, which is what a run does."""
        steps = self._passes * len(self._batches)
        job = self._job.model_copy(update={"steps": FIRST_STEP + steps})
        ledger: list[dict[str, Any]] = []
        clock = Clock(self._loaded.device)
        began = clock.now()
        train(
            job,
            self._loaded,
            fast,
            scope,
            make_optimizer(job),
            self._rows,
            Progress(step=FIRST_STEP),
            ledger.append,
            lambda _step: False,
        )
        return (clock.now() - began) / steps

    def _floor(self, fast: FastForward, tokens: Sequence[int]) -> ProductFloor:
        """Of the tuned block, those above it and the head, for both points."""
        places = [len(fast.prepare(batch).scored.position) for batch in self._batches]
        return ProductFloor(
            self._loaded.decoder.blocks[self._layer :],
            self._loaded.model.get_output_embeddings(),  # type: ignore[operator]
            [2 * n for n in tokens],
            [2 * n for n in places],
        )

    def _products(self, floor: ProductFloor) -> float:
        """Milliseconds of the products alone."""
        clock = Clock(self._loaded.device)
        began = clock.now()
        for _ in range(self._passes):
            floor.run()
        return (clock.now() - began) / self._passes / len(self._batches)

    def _peak(self, run: Callable[[], object]) -> int | None:
        if self._kind != "cuda":
            run()
            return None
        gc.collect()  # graphs of another task
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
