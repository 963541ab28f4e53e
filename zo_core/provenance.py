"""Where a result comes from: versions, hardware and settings, for the sidecar of every export."""

import platform
import time
from importlib.metadata import version
from typing import Any

import torch

from zo_core.models.load import LoadedModel

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pandas")


def provenance(loaded: LoadedModel) -> dict[str, Any]:
    """Facts about the model, the device and the software of a run."""
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "architecture": loaded.info.architecture,
        "parameters": loaded.info.parameters,
        "dtype": loaded.dtype_name,
        "device": str(loaded.device),
        "device_name": device_name(loaded.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"
