"""Would an fp8 suffix do? What rounding does to the projected gradient, simulated on any device.

``python -m zo_core.bench.fp8 --data-dir DIR`` perturbs the first outlier layer of the bundled model
and finds g = (L+ - L-) / (2 eps) for the same draws and rows in three arithmetics: float32; linear
layers rounded to bfloat16; and, above the tuned layer, inputs and weights rounded to float8_e4m3
with one scale a token and one an output row, the finest that fp8 matrix units take. What it says is
kept in docs/benchmarks/README.md.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import correlation, fmean

import torch
from torch import Tensor, nn

from zo_core.jobs import TuneJob
from zo_core.models import resident
from zo_core.models.decoder import find_decoder
from zo_core.tasks.data import load_job_task
from zo_core.tasks.templates import encode_rows
from zo_core.zo.estimator import estimate
from zo_core.zo.forward import ReferenceForward
from zo_core.zo.scope import Draw, TunedScope, scope_parameters

LAYER = 3
"""The bundled model's first outlier layer."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max
Round = Callable[[Tensor], Tensor]


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _fp8(x: Tensor) -> Tensor:
    """Rows of [..., n] rounded to float8_e4m3, each with a scale of its own."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@contextmanager
def _rounded(blocks: Sequence[nn.Module], below: Round, above: Round) -> Iterator[None]:
    """Linear layers round inputs and weights, and their outputs to bfloat16."""
    changed = []
    for k, block in enumerate(blocks):
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):

            def forward(
                x: Tensor, linear: nn.Linear = linear, to: Round = above if k > LAYER else below
            ) -> Tensor:
                return _bf16(nn.functional.linear(to(x), to(linear.weight), linear.bias))

            linear.forward = forward  # type: ignore[method-assign, assignment]
            changed.append(linear)
    try:
        yield
    finally:
        for linear in changed:
            del linear.forward


def compare_arithmetics(data_dir: Path, draws: int) -> dict[str, dict[str, float]]:
    """RMS error and correlation of g against float32, by arithmetic, on SST-2 rows.

    Args:
        data_dir: as ``--data-dir`` of ``tune``.
        draws: draws of z, each on a batch of its own.
    """
    job = TuneJob(task="sst2", data_dir=str(data_dir), dtype="float32")
    loaded = resident.acquire(job, print)
    rows = load_job_task(job, 16 * draws, 1, 0, 1)
    examples = encode_rows(rows.task, rows.train, loaded.tokenizer, loaded.context, training=True)
    forward = ReferenceForward(loaded)
    blocks = find_decoder(loaded.model).blocks
    scope = TunedScope(scope_parameters(loaded, LAYER))
    found: dict[str, list[float]] = {}

    def g_of(draw: int) -> float:
        batch = [forward.prepare(examples[16 * draw : 16 * draw + 16])]
        return estimate(forward, batch, scope, [Draw(job.noise, 0, draw)], job.eps).g[0]

    with torch.no_grad():
        found["float32"] = [g_of(draw) for draw in range(draws)]
        for name, above in (("bfloat16", _bf16), ("fp8 above the tuned layer", _fp8)):
            with _rounded(blocks, _bf16, above):
                found[name] = [g_of(draw) for draw in range(draws)]
    scope.close()
    exact = found["float32"]
    return {
        name: {
            "rms_g": fmean(x * x for x in g) ** 0.5,
            "rms_error": fmean((x - y) ** 2 for x, y in zip(g, exact, strict=True)) ** 0.5,
            "correlation": correlation(g, exact),
        }
        for name, g in found.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="as in tune")
    parser.add_argument("--draws", type=int, default=32, help="draws of z")
    given = parser.parse_args()
    print(json.dumps(compare_arithmetics(given.data_dir, given.draws), indent=1))
