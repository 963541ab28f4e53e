"""What rounding does to the projected gradient, in the model's dtype and in two kinds of fp8.

``python -m zo_core.bench.fp8 --data-dir DIR`` perturbs a layer of the bundled model in bfloat16 and
finds g = (L+ - L-) / (2 eps) for the same draws and rows in four arithmetics: float32 (of the same
bfloat16 weights); the model's own; above the tuned layer, inputs and weights of each point rounded
to float8_e4m3 as fp8 inference does, with one scale a token and one an output row; and the fp8
suffix of a job, which rounds mean and half difference of the pair (:mod:`zo_core.zo.fp8`). On any
device; what it says is kept in docs/benchmarks/README.md.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import correlation, fmean

import torch
from torch import Tensor, nn

from zo_core.jobs import TuneJob
from zo_core.models import resident
from zo_core.tasks.data import load_job_task
from zo_core.tasks.templates import encode_rows
from zo_core.zo.estimator import estimate
from zo_core.zo.forward import FastForward
from zo_core.zo.fp8 import rounded
from zo_core.zo.reference import Forward, ReferenceForward
from zo_core.zo.rounding import in_float32
from zo_core.zo.scope import Draw, TunedScope, scope_parameters

FIRST_OUTLIER_LAYER = 3
"""Of the bundled model."""


def _through_fp8(x: Tensor) -> Tensor:
    """Rows of [..., n] rounded to fp8, each with a scale of its own."""
    rows, scale = rounded(x.float())
    return (rows.float() * scale).to(x.dtype)


@contextmanager
def _points_apart(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Linear layers round inputs and weights to fp8, whatever the other point does."""
    linears = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    for linear in linears:

        def forward(x: Tensor, linear: nn.Linear = linear) -> Tensor:
            return nn.functional.linear(_through_fp8(x), _through_fp8(linear.weight), linear.bias)

        linear.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


@torch.no_grad()
def compare_arithmetics(data_dir: Path, draws: int, layer: int) -> dict[str, dict[str, float]]:
    """RMS error and correlation of g against float32, by arithmetic, on SST-2 rows.

    Args:
        data_dir: as ``--data-dir`` of ``tune``.
        draws: draws of z, each on a batch of its own.
        layer: the tuned one.
    """
    job = TuneJob(task="sst2", data_dir=str(data_dir), dtype="bfloat16")
    loaded = resident.acquire(job, print)
    rows = load_job_task(job, 16 * draws, 1, 0, 1)
    examples = encode_rows(rows.task, rows.train, loaded.tokenizer, loaded.context, training=True)
    scope = TunedScope(scope_parameters(loaded, layer))

    def gradients(path: Forward) -> list[float]:
        batches = (path.prepare(examples[16 * i : 16 * i + 16]) for i in range(draws))
        return [
            estimate(path, [batch], scope, [Draw(job.noise, 0, i)], job.eps).g[0]
            for i, batch in enumerate(batches)
        ]

    found = {"bfloat16": gradients(FastForward(loaded, layer))}
    with _points_apart(loaded.decoder.blocks[layer + 1 :]):
        found["fp8, each point apart"] = gradients(FastForward(loaded, layer))
    found["fp8 suffix"] = gradients(FastForward(loaded, layer, fp8=True))
    scope.restore()
    with in_float32(loaded.model):
        exact = gradients(ReferenceForward(loaded))
    scope.close()
    return {
        name: {
            "rms_g": fmean(x * x for x in g) ** 0.5,
            "rms_error": fmean((x - y) ** 2 for x, y in zip(g, exact, strict=True)) ** 0.5,
            "correlation": correlation(g, exact),
        }
        for name, g in ({"float32": exact} | found).items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="as in tune")
    parser.add_argument("--draws", type=int, default=32, help="draws of z")
    parser.add_argument("--layer", type=int, default=FIRST_OUTLIER_LAYER, help="the tuned layer")
    given = parser.parse_args()
    print(json.dumps(compare_arithmetics(given.data_dir, given.draws, given.layer), indent=1))
