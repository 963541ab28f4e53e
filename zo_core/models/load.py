"""Load a causal LM and its tokenizer: bundled, local folder or hub id."""

import contextlib
import io
from dataclasses import dataclass

import psutil
import torch
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
        UserError: a GPU was asked for and there is none of that number.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    picked = torch.device(device)
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {device} is not here ({torch.cuda.device_count()} GPUs seen): choose auto or "
            "cpu."
        )
    return picked


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


def load(fields: ModelFields) -> LoadedModel:
    """Load the model that a job names.

    Raises:
        ModelError: the model cannot be found or read.
        UserError: it does not fit, or its decoder blocks cannot be found.
    """
    device = pick_device(fields.device)
    dtype = pick_dtype(fields.dtype, device)
    info = describe(fields.model, fields.revision)
    need = memory.estimate(info, str(dtype).removeprefix("torch.")).weights
    free = free_memory(device)
    if need > free:
        raise UserError(
            f"model: {fields.model} needs {need / GIB:.1f} GiB on {device} and {free / GIB:.1f} "
            "are free: unload other models, try bfloat16, or a larger device."
        )
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(info.path, revision=fields.revision)
        model = AutoModelForCausalLM.from_pretrained(
            info.path,
            revision=fields.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model: {fields.model} cannot be loaded: {first}") from error
    model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
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
