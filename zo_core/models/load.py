"""Load a causal LM and its tokenizer: bundled, local folder or hub id."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from zo_core.errors import UserError
from zo_core.jobs import ModelFields
from zo_core.models import memory
from zo_core.models.catalog import ModelError, ModelInfo, describe
from zo_core.models.decoder import Decoder, find_decoder

GIB = 2**30


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with what the analyses need beside it."""

    name: str
    revision: str | None
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    device: torch.device
    dtype: torch.dtype
    info: ModelInfo

    @property
    def dtype_name(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""
        return self.info.context or self.tokenizer.model_max_length

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        tensors = {t.data_ptr(): t.nbytes for t in self.model.parameters()}
        return sum(tensors.values())


def pick_device(device: str) -> torch.device:
    """The device a job runs on; ``auto`` prefers a GPU.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device: cuda is not here: choose auto or cpu.")
    return torch.device("cuda", torch.cuda.current_device())


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype weights are loaded in; ``auto`` is float32 on a CPU and bfloat16 on a GPU."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, dtype)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return psutil.virtual_memory().available


@torch.no_grad()
def check_causal(name: str, model: nn.Module, device: torch.device) -> None:
    """Refuse a model whose output depends on tokens to the right, such as an encoder.

    Right padding, and so every analysis here, relies on causal attention.

    Raises:
        UserError: it does.
    """
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=device)
    check_same_past(name, model(input_ids=tokens, use_cache=False).logits)


def check_same_past(name: str, output: torch.Tensor) -> None:
    """Refuse a model by its output [2, T, C] for two rows that differ in the last token.

    Raises:
        UserError: it differs before the last token.
    """
    one, other = output[:, :-1].float()
    same = torch.allclose(one, other, rtol=1e-2, atol=1e-2)
    if not same and bool(one.isfinite().all()) and bool(other.isfinite().all()):
        raise UserError(
            f"model: {name} sees tokens to the right (an encoder?): ZOScope needs a causal "
            "language model."
        )


def _offload(
    device: torch.device, folder: Path | None, max_memory: dict[int | str, int] | None
) -> dict[str, Any]:
    """What ``from_pretrained`` is told of weights that may not fit."""
    if folder is None:
        return {}
    if max_memory is None and device.type == "cpu":
        max_memory = {"cpu": int(free_memory(device) * 0.8)}
    return {"device_map": "auto", "offload_folder": str(folder), "max_memory": max_memory}


UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises on files that are missing, torn or of an unknown kind."""


def cannot_be_loaded(model: str, error: Exception) -> ModelError:
    """What to say of a model, or of a file of one, that a library could not read."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(f"model: {model} cannot be loaded: {first}")


def load_tokenizer(fields: ModelFields, info: ModelInfo) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that a job names; no weights are read.

    Raises:
        ModelError: it cannot be found or read.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return AutoTokenizer.from_pretrained(info.path, revision=fields.revision)
    except UNREADABLE as error:
        raise cannot_be_loaded(fields.model, error) from error


def load(
    fields: ModelFields,
    offload_to: Path | None = None,
    max_memory: dict[int | str, int] | None = None,
) -> LoadedModel:
    """Load the model that a job names.

    Args:
        fields: the job.
        offload_to: a folder: weights that fit on no GPU stay in CPU memory, or in files there, and
            come in while their layer runs (``accelerate``). None: all of them on the device.
        max_memory: with ``offload_to``, bytes a GPU number or ``cpu`` may take; None: what is free.

    Raises:
        ModelError: the model cannot be found or read.
        UserError: it does not fit, or its decoder blocks cannot be found.
    """
    device = pick_device(fields.device)
    dtype = pick_dtype(fields.dtype, device)
    info = describe(fields.model, fields.revision)
    need = memory.estimate(info, str(dtype).removeprefix("torch.")).weights
    free = free_memory(device)
    if offload_to is None and need > free:
        raise UserError(
            f"model: {fields.model} needs {need / GIB:.1f} GiB on {device} and {free / GIB:.1f} "
            "are free: unload other models, try bfloat16 or a larger device, or scan with "
            "placement offload or stream."
        )
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(fields, info)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            info.path,
            revision=fields.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_offload(device, offload_to, max_memory),
        )
        model, found = loaded
        if found["missing_keys"]:
            raise ValueError(f"its files lack {sorted(found['missing_keys'])[0]}")
    except UNREADABLE as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise
        raise cannot_be_loaded(fields.model, error) from error
    if offload_to is None:
        model.to(device)
    model.eval().requires_grad_(False)
    check_causal(fields.model, model, device)
    return LoadedModel(
        name=fields.model,
        revision=fields.revision,
        model=model,
        tokenizer=tokenizer,
        decoder=find_decoder(model),
        device=device,
        dtype=dtype,
        info=info,
    )
