"""Models kept loaded between jobs, least recently used first out."""

import gc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from zo_core.jobs import ModelFields
from zo_core.models import catalog, memory
from zo_core.models.load import LoadedModel, free_memory, load, pick_device, pick_dtype

HEADROOM = 1.25
"""A model is let in when this multiple of its weights is free: the rest is for its forward pass."""

_models: OrderedDict[tuple[str, str | None, torch.dtype, torch.device], LoadedModel] = OrderedDict()


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
    key = (fields.model, fields.revision, dtype, device)
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


def drop(loaded: LoadedModel) -> None:
    """Forget one model, for example because its weights may have been left changed."""
    for key in [k for k, v in _models.items() if v is loaded]:
        del _models[key]
    _collect()


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


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
