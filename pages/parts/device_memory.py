"""What the device that takes a job has of memory, and what a tuning run would need of it."""

import socket
from dataclasses import dataclass

import psutil
import streamlit as st

from pages.parts.choice import Choice, describe
from pages.parts.words import size
from zo_core import backend, scope_spec
from zo_core.jobs import TuneJob
from zo_core.models.memory import Tuning, tuned_values, tuning

PARTS = {
    "weights": "weights",
    "base": "base copy",
    "master": "fp32 master",
    "moments": "optimizer state",
    "gradients": "gradients",
    "copies": "perturbed copies",
    "fp8": "fp8 weights (at most)",
    "noise": "noise",
    "prefix_cache": "prefix cache (at most)",
    "activations": "activations",
    "logits": "logits",
    "graphs": "CUDA graphs",
}
TYPICAL_TOKENS = 256
"""Tokens a row, while no row has been read yet."""


def gpus() -> list[dict]:
    """Workers that have one."""
    return [w for w in backend.workers() if str(w.get("device", "")).startswith("cuda")]


def on_gpu(choice: Choice) -> bool:
    """Whether jobs of this choice run on a GPU."""
    return choice.device.startswith("cuda") or (choice.device == "auto" and bool(gpus()))


def dtype_of(choice: Choice) -> str:
    """The precision that auto stands for."""
    return choice.dtype if choice.dtype != "auto" else "bfloat16" if on_gpu(choice) else "float32"


@dataclass(frozen=True, slots=True)
class Device:
    """Memory of the worker that would take the model, in bytes."""

    free: int | None
    """Its own copy of the model counts as free; None: not known."""
    gpu_bytes: int | None
    """All of a GPU; None: a CPU, or not known."""

    @classmethod
    def of(cls, choice: Choice) -> "Device":
        """As the workers last said."""
        gpu = on_gpu(choice)
        for worker in gpus() if gpu else backend.workers():
            if choice.device.startswith("cuda:") and worker.get("device") != choice.device:
                continue
            free = worker.get("device_memory_free")
            if not gpu and worker["process"]["host"] == socket.gethostname():
                free = psutil.virtual_memory().available
            if free is not None:
                held = sum(
                    m.get("bytes") or 0
                    for m in worker.get("resident") or []
                    if m.get("model") == choice.model
                )
                return cls(free + held, worker.get("device_memory") if gpu else None)
        return cls(None, None)


def tune_need(choice: Choice, values: dict) -> Tuning | None:
    """What the run that a form describes would hold; None while it is not valid.

    Args:
        choice: the model.
        values: fields of the form.
    """
    info, _ = describe(choice)
    try:
        job = TuneJob(**{k: v for k, v in values.items() if k in _ASKED and v is not None})
        spec = scope_spec.parse(job.scope)
    except ValueError:
        return None
    if info is None:
        return None
    rows = job.train_examples + job.eval_examples + (job.dev_examples or 500)
    frozen = spec.form not in {"full", "sparse", "prefix", "all-but"}
    return tuning(
        info,
        "float32" if job.precision == "fp32" else dtype_of(choice),
        tuned_values(info, spec.form, len(spec.layers)),
        rows=job.batch_size,
        tokens=min(TYPICAL_TOKENS, info.context or TYPICAL_TOKENS),
        optimizer=job.optimizer,
        estimator=job.estimator,
        directions=job.directions,
        inplace=job.precision == "inplace",
        reference=job.path == "reference" or bool(job.reference_only),
        cached_tokens=rows * TYPICAL_TOKENS if frozen else 0,
        device_bytes=Device.of(choice).gpu_bytes,
        fp8=job.suffix == "fp8",
    )


_ASKED = (
    *("scope", "batch_size", "optimizer", "estimator", "directions", "precision", "path"),
    "suffix",
    *("train_examples", "eval_examples", "dev_examples"),
)


def tune_line(choice: Choice, values: dict) -> None:
    """One line: the memory that a run needs, of what, and whether it is there."""
    need = tune_need(choice, values)
    if need is None:
        return
    free = Device.of(choice).free
    parts = [f"{PARTS[p]} {size(getattr(need, p))}" for p in PARTS if getattr(need, p)]
    of = f" of {size(free)} free" if free is not None else ""
    text = f"Memory: about {size(need.total)}{of}, for rows of {TYPICAL_TOKENS} tokens"
    if free is not None and need.needed > free:
        text = f":material/memory: **{text}**; a run short of GPU memory splits its batches"
    st.caption(f"{text} ({', '.join(parts)}).")
