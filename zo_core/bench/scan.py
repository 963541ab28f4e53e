"""Time and measure the activation scan on a checkpoint of a published shape.

* cold: from files that are not in the system's cache to the tables;
* resident: the scan beside a plain forward pass of the same rows, in turns, in one process;
* streaming: block by block on the CPU in a process of its own, for its peak memory, and on the GPU
  from cold files, for its time.

Every scan has to name the planted layer, token and channel.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoConfig, PreTrainedConfig

from zo_core.analysis.activations import ActivationScan
from zo_core.analysis.kernels import statistics as kernels
from zo_core.analysis.outliers import first_outlier_layer
from zo_core.analysis.streaming import scan_blockwise
from zo_core.bench.checkpoint import Planted, random_rows, write_checkpoint
from zo_core.bench.shapes import SHAPES
from zo_core.errors import UserError
from zo_core.jobs import ModelFields
from zo_core.models.blockwise import BlockwiseModel
from zo_core.models.catalog import DEMO_PATH
from zo_core.models.load import LoadedModel, load, pick_device
from zo_core.provenance import provenance
from zo_core.tasks.scoring import batches

GIB = 1 << 30
TARGETS = {"cold": 30.0, "resident": 3.0, "overhead": 1.3, "streaming_peak": 3 * GIB}
"""Seconds, seconds, ratio, bytes."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What is scanned."""

    sequences: int
    tokens: int
    batch_size: int

    def draw(self, planted: Planted) -> list[list[int]]:
        """The token rows."""
        return list(random_rows(self.sequences, self.tokens, planted))


def run_scan_bench(
    shape: str,
    folder: Path,
    device: str = "auto",
    rows: Rows | None = None,
    streamed_rows: Rows | None = None,
    rounds: int = 3,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Measure everything on one shape.

    Args:
        shape: a key of :data:`zo_core.bench.shapes.SHAPES`.
        folder: of the checkpoint; written if it holds none.
        device: ``auto``, ``cpu`` or ``cuda``.
        rows: of the cold and the resident scan; None: 64 x 512 on a GPU, 4 x 64 on a CPU.
        streamed_rows: of the streaming scan on the CPU; None: 2 x 64.
        rounds: of forward pass and scan.
        say: receives a line before each measurement.

    Raises:
        UserError: the shape is unknown.
    """
    config, planted = _shape(shape)
    place = pick_device(device)
    rows = rows or (Rows(64, 512, 16) if place.type == "cuda" else Rows(4, 64, 2))
    written = None
    if not (folder / "config.json").is_file():
        say(f"writing {folder}")
        began = time.perf_counter()
        size = write_checkpoint(config, folder, planted, device=place, say=say)
        written = {"seconds": time.perf_counter() - began, "bytes": size}
    fields = ModelFields.model_validate({"model": str(folder), "device": device})
    result: dict[str, Any] = {
        "shape": shape,
        "planted": {"layer": planted.layer, "token": planted.token, "channel": planted.channel},
        "rows": {"sequences": rows.sequences, "tokens": rows.tokens, "batch": rows.batch_size},
        "checkpoint": written,
        "targets": TARGETS,
    }
    if place.type == "cuda":
        result["kernel"] = kernels.why_not(place.index or 0) or "compiled"
    say("cold: load and scan")
    result["cold"], loaded = _cold(fields, planted, rows)
    say("resident: forward pass and scan in turns")
    result["resident"] = _resident(loaded, planted, rows, rounds)
    result["provenance"] = provenance(loaded)
    del loaded
    if place.type == "cuda":
        torch.cuda.empty_cache()
        say("streaming on the GPU, cold")
        result["streaming_gpu"] = _streamed(fields, planted, rows)
    say("streaming on the CPU")
    result["streaming_cpu"] = _streamed_apart(folder, planted, streamed_rows or Rows(2, 64, 1))
    result["reached"] = {
        "cold": result["cold"]["total"] <= TARGETS["cold"],
        "resident": result["resident"]["total"] <= TARGETS["resident"],
        "overhead": result["resident"]["overhead"] <= TARGETS["overhead"],
        "streaming_peak": result["streaming_cpu"]["peak_bytes"] <= TARGETS["streaming_peak"],
    }
    return result


def _shape(shape: str) -> tuple[PreTrainedConfig, Planted]:
    if shape not in SHAPES:
        raise UserError(f"scan: {shape!r} is unknown: choose one of {', '.join(SHAPES)}.")
    config, layer = SHAPES[shape]
    if config is None:
        config = AutoConfig.from_pretrained(DEMO_PATH)
    return config, Planted(layer, token=4242, channel=2533 % config.hidden_size)


def drop_cache(folder: Path) -> None:
    """Take a checkpoint's files out of the system's cache, as far as the system lets us."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def found(scan: ActivationScan, planted: Planted) -> dict[str, Any]:
    """Whether a scan names what was planted."""
    table = scan.layers()
    verdict = first_outlier_layer("emergence", table)
    row = table.set_index("layer").loc[planted.layer]
    right = (
        verdict.layer == planted.layer
        and row["top1_channel"] == planted.channel
        and row["top1_position"] == 0
    )
    return {"right": bool(right), "layer": verdict.layer, "top1": float(row["top1"])}


def tables(scan: ActivationScan) -> list[pd.DataFrame]:
    """Everything that a scan writes."""
    makers = (scan.layers, scan.parts, scan.channels, scan.tokens, scan.weights, scan.owl)
    return [make() for make in makers]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cold(fields: ModelFields, planted: Planted, rows: Rows) -> tuple[dict[str, Any], LoadedModel]:
    drop_cache(Path(fields.model))
    began = time.perf_counter()
    loaded = load(fields)
    ready = _now(loaded.device)
    scan = ActivationScan(loaded)
    scan.run(rows.draw(planted), rows.batch_size)
    tables(scan)
    end = _now(loaded.device)
    times = {"load": ready - began, "scan": end - ready, "total": end - began}
    return times | {"found": found(scan, planted)}, loaded


@torch.no_grad()
def _resident(loaded: LoadedModel, planted: Planted, rows: Rows, rounds: int) -> dict[str, Any]:
    """Median seconds of a plain forward pass, of the scan's pass, and of all of it."""
    ids = rows.draw(planted)
    device = loaded.device

    def forward() -> float:
        began = _now(device)
        for chunk in batches(len(ids), rows.batch_size):
            batch = torch.tensor([ids[i] for i in chunk], device=device)
            loaded.model.base_model(input_ids=batch, use_cache=False)  # type: ignore[operator]
        return _now(device) - began

    def scanned() -> tuple[float, float, float]:
        began = _now(device)
        scan = ActivationScan(loaded)
        scan.watch(ids, rows.batch_size)
        passed = _now(device)
        scan.read_weights()
        weighed = _now(device)
        tables(scan)
        return passed - began, weighed - passed, _now(device) - weighed

    forward(), scanned()
    plain, parts = [], []
    for _ in range(rounds):
        plain.append(forward())
        parts.append(scanned())
    passed, weights, written = (statistics.median(column) for column in zip(*parts, strict=True))
    return {
        "forward": statistics.median(plain),
        "pass": passed,
        "weights": weights,
        "tables": written,
        "total": passed + weights + written,
        "overhead": passed / statistics.median(plain),
        "forwards": plain,
        "passes": [p for p, _, _ in parts],
    }


def _streamed(fields: ModelFields, planted: Planted, rows: Rows) -> dict[str, Any]:
    """A streaming scan from cold files, in this process."""
    drop_cache(Path(fields.model))
    cuda = pick_device(fields.device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    model = BlockwiseModel(fields)
    scan = ActivationScan(model.loaded)
    scan_blockwise(scan, model, rows.draw(planted), rows.batch_size)
    tables(scan)
    seconds = _now(model.loaded.device) - began
    return {
        "seconds": seconds,
        "sequences": rows.sequences,
        "tokens": rows.tokens,
        "peak_bytes": peak_of_process(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "dtype": model.loaded.dtype_name,
        "found": found(scan, planted),
    }


def peak_of_process() -> int:
    """Bytes of memory this process has held at most, mapped pages of the weight files included.

    Linux keeps it by address space. What ``getrusage`` says begins at the size of the process that
    started this one, which may be larger.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _streamed_apart(folder: Path, planted: Planted, rows: Rows) -> dict[str, Any]:
    """The same on the CPU in a process of its own, so that its peak is its own."""
    numbers = [planted.layer, planted.token, planted.channel]
    numbers += [rows.sequences, rows.tokens, rows.batch_size]
    command = [sys.executable, "-m", __name__, str(folder), *map(str, numbers)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        command, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"the streaming scan ended {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str]) -> None:
    """Scan a checkpoint block by block on the CPU and print what it took, as JSON."""
    folder, numbers = arguments[0], [int(n) for n in arguments[1:]]
    fields = ModelFields.model_validate({"model": folder, "device": "cpu"})
    print(json.dumps(_streamed(fields, Planted(*numbers[:3]), Rows(*numbers[3:]))))


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with what it was measured on."""
    facts, rows = result["provenance"], result["rows"]
    cold, resident, streamed = result["cold"], result["resident"], result["streaming_cpu"]
    lines = [
        f"`{result['shape']}`, {rows['sequences']} x {rows['tokens']} tokens, batch "
        f"{rows['batch']}, {facts['dtype']}, {facts['device_name']}, torch "
        f"{facts['packages']['torch']}, transformers {facts['packages']['transformers']}, "
        f"{facts['written'][:10]}",
        "",
        "| | measured | aim |",
        "|---|---|---|",
        f"| scan from cold files | {cold['total']:.1f} s (load {cold['load']:.1f}) | "
        f"{TARGETS['cold']:g} s |",
        f"| scan, resident | {resident['total']:.2f} s (pass {resident['pass']:.2f}, weights "
        f"{resident['weights']:.2f}, tables {resident['tables']:.2f}) | "
        f"{TARGETS['resident']:g} s |",
        f"| plain forward pass | {resident['forward']:.2f} s | |",
        f"| overhead of the pass | {resident['overhead']:.2f} x | {TARGETS['overhead']:g} x |",
        f"| streaming on the CPU, {streamed['sequences']} x {streamed['tokens']} tokens, "
        f"{streamed['dtype']} | {streamed['seconds']:.0f} s, peak "
        f"{streamed['peak_bytes'] / GIB:.2f} GiB | {TARGETS['streaming_peak'] / GIB:g} GiB |",
    ]
    if "streaming_gpu" in result:
        gpu = result["streaming_gpu"]
        lines.append(
            f"| streaming on the GPU, cold | {gpu['seconds']:.1f} s, peak "
            f"{gpu['peak_device_bytes'] / GIB:.2f} GiB of its memory | |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
