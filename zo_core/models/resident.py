"""Models kept loaded between jobs, least recently used first out."""

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from zo_core.jobs import ModelFields
from zo_core.models import catalog, memory
from zo_core.models.load import LoadedModel, free_memory, load, pick_device, pick_dtype

HEADROOM = 1.25
"""A model is let in when this multiple of its weights is free: the rest is for its forward pass."""

_models: OrderedDict[tuple[Hashable, ...], LoadedModel] = OrderedDict()


def acquire(fields: ModelFields, say: Callable[[str], None] = lambda _line: None) -> LoadedModel:
    """The loaded model that a job names, loading it if it is not resident.

    Args:
        fields: the job.
        say: receives a line when something slow happens.

    Raises:
        UserError: see :func:`zo_core.models.load.load`.
    """
    device = pick_device(fields.device)
    dtype = pick_dtype(fields.dtype, device)
    key = (fields.model, fields.revision, dtype, device, _version(fields.model))
    if key not in _models:
        say(f"Loading {fields.model}")
        info = catalog.describe(fields.model, fields.revision)
        need = memory.estimate(info, str(dtype).removeprefix("torch.")).weights * HEADROOM
        while _models and free_memory(device) < need:
            _, oldest = _models.popitem(last=False)
            say(f"Unloading {oldest.name} to make room")
            del oldest
            _collect()
        _models[key] = load(fields)
    _models.move_to_end(key)
    return _models[key]


def clear() -> int:
    """Unload everything; returns how many models there were."""
    count = len(_models)
    _models.clear()
    _collect()
    return count


def describe() -> list[dict[str, Any]]:
    """What is resident, for the engine state file."""
    return [
        {
            "model": m.name,
            "revision": m.revision,
            "dtype": m.dtype_name,
            "device": str(m.device),
            "parameters": m.info.parameters,
            "bytes": m.bytes,
        }
        for m in list(_models.values())
    ]


def _version(model: str) -> Hashable:
    """What tells a local model from the one that was in the folder before."""
    source, folder = catalog.resolve(model)
    if source == "hub":
        return None
    files = sorted(f for f in Path(folder).iterdir() if f.suffix in {".json", ".safetensors"})
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files)


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
