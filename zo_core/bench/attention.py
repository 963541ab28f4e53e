"""The attention kernel against flash attention, on the segments of real batches, on a GPU.

``python -m zo_core.bench.attention --data-dir DIR`` prints microseconds a layer for a pair of
points, by task and head counts; what it says is kept in docs/benchmarks/README.md.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention.varlen import varlen_attn

from zo_core.bench.shapes import LENGTHS, build, examples
from zo_core.errors import UserError
from zo_core.zo.packing import Packing, pack, shared_start

HEADS = {"LLaMA2-7B": (32, 32, 128), "Qwen3-8B": (32, 8, 128), "demo": (4, 4, 64)}
"""Query heads, key heads and their width."""
BATCH, CALLS, REPEATS = 16, 20, 12
SCALING = 0.1


def time_attention(data_dir: Path | None) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds of a call, by task, model and kernel.

    Args:
        data_dir: local rows; where they are absent, lengths are drawn.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("device: the attention kernel needs a GPU, and none is here.")
    from zo_core.zo.kernels.attention import attend

    demo, _ = build("demo", "cuda", "bfloat16")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task in LENGTHS:
        rows, _ = examples(task, demo, BATCH, data_dir)
        groups = [e.rows for e in rows]
        packing = pack(groups, demo.device, shared_start(groups))[2].repeated(2)
        found[task] = {}
        for model, (heads, key_heads, width) in HEADS.items():
            query, key, value = (
                torch.randn(packing.tokens, n, width, device="cuda", dtype=torch.bfloat16)
                for n in (heads, key_heads, key_heads)
            )
            states = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
            found[task][model] = {
                "flash": _microseconds(partial(_flash, *states, packing)),
                "ours": _microseconds(partial(attend, *states, packing, SCALING)),
            }
    return found


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing
) -> torch.Tensor:
    """Flash attention, which wants heads repeated and shared keys gathered."""
    repeats = query.shape[0] // key.shape[0]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    if packing.shared:
        key, value = key[packing.key_index], value[packing.key_index]
    lengths = packing.longest_query, packing.longest_key
    out: torch.Tensor = varlen_attn(  # type: ignore[assignment]
        *(query.transpose(0, 1), key, value, packing.query_borders, packing.key_borders, *lengths),
        scale=SCALING,
        window_size=(-1, 0),
    )
    return out


def _microseconds(run: Callable[[], object]) -> float:
    """Of a call, replayed from a CUDA graph of many."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / CALLS * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="as in tune")
    try:
        print(json.dumps(time_attention(parser.parse_args().data_dir), indent=1))
    except UserError as error:
        sys.exit(str(error))
