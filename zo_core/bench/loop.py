"""The training loop alone on a GPU: what CUDA graphs save, and which kernels a step is made of.

``python -m zo_core.bench.loop --data-dir DIR --dtype float32 --scope full`` times steps of a shape
(:mod:`zo_core.bench.shapes`) launched one by one and replayed from graphs, without an engine and
without evaluations, and lists the kernels of the graphed steps by time. What it says is kept in
docs/benchmarks/README.md.
"""

import argparse
import gc
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zo_core.bench.shapes import SHAPES, build, examples
from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.models.load import LoadedModel
from zo_core.scope_spec import parse
from zo_core.tasks.templates import Example
from zo_core.zo.forward import FastForward
from zo_core.zo.scope import TunedScope
from zo_core.zo.scopes import select
from zo_core.zo.trainer import Progress, make_optimizer, train

LR = 1e-9
"""Too small to move a weight: random models must not run away."""
PROFILED = 8
"""Steps whose kernels are counted."""


def run_loop_bench(
    shape: str, task: str, data_dir: Path | None, scope: str, dtype: str, rows: int, steps: int
) -> dict[str, Any]:
    """Time the loop on a task's rows, with and without graphs.

    Args:
        shape: a key of :data:`zo_core.bench.shapes.SHAPES`.
        task: a task name.
        data_dir: local rows.
        scope: what is tuned.
        dtype: see :class:`~zo_core.jobs.ModelFields`.
        rows: training rows.
        steps: of each loop; those of the first third, which capture, are left out.

    Returns:
        ``launched`` and ``graphs`` (milliseconds a step), ``kernels`` (name -> milliseconds a step
        and launches a step, the 20 longest), ``device``.

    Raises:
        UserError: there is no GPU, or the shape or task is unknown.
    """
    if not torch.cuda.is_available():
        raise UserError("device: CUDA graphs need a GPU, and none is here.")
    loaded, _ = build(shape, "cuda", dtype)
    data, _ = examples(task, loaded, rows, data_dir)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for name, graphs in (("launched", False), ("graphs", True)):
        selection = select(loaded, parse(scope))
        tuned = TunedScope(selection.parameters, selection.masks)
        forward = FastForward(
            loaded, selection.lowest or 0, graphs=graphs, tuned=selection.parameters
        )
        forward.register(data)
        try:
            job = TuneJob(scope=scope, steps=steps, lr=LR)
            seconds = _loop(job, loaded, forward, tuned, data)
            first = steps // 3
            found[name] = (seconds[-1] - seconds[first - 1]) / (steps - first) * 1e3
            if graphs:
                found["kernels"] = _kernels(job, loaded, forward, tuned, data)
        finally:
            tuned.close()
            selection.close()
        del forward
        gc.collect()
    return found


def _loop(
    job: TuneJob,
    loaded: LoadedModel,
    forward: FastForward,
    scope: TunedScope,
    rows: Sequence[Example],
    begin: int = 0,
) -> list[float]:
    """Seconds since the start at the end of every step after ``begin``."""
    ledger: list[dict[str, Any]] = []
    train(
        *(job, loaded, forward, scope, make_optimizer(job), rows, Progress(step=begin)),
        ledger.append,
        lambda _step: False,
    )
    return [record["seconds"] for record in ledger]


def _kernels(
    job: TuneJob,
    loaded: LoadedModel,
    forward: FastForward,
    scope: TunedScope,
    rows: Sequence[Example],
) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches a step of the longest kernels."""
    more = job.model_copy(update={"steps": job.steps + PROFILED})
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=both) as profile:
        _loop(more, loaded, forward, scope, rows, begin=job.steps)
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profile.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time
            launches[event.name] += 1
    return {
        name[:120]: (total / PROFILED / 1e3, launches[name] / PROFILED)
        for name, total in times.most_common(20)
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="as in tune")
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--scope", default="layer:3")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument("--steps", type=int, default=700)
    try:
        print(json.dumps(run_loop_bench(**vars(parser.parse_args())), indent=1))
    except UserError as error:
        sys.exit(str(error))
