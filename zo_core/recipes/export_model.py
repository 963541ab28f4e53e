"""The exports that need the model: a whole model folder, and an adapter folder."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from zo_core.artifacts.source import Source, base_of
from zo_core.jobs import ExportJob
from zo_core.models.load import LoadedModel
from zo_core.progress import JobContext
from zo_core.recipes.reopen import reopened
from zo_core.zo.checkpoint import read_checkpoint
from zo_core.zo.scope import TunedScope
from zo_core.zo.scopes.lora import ADAPTER

SHARD = "4GB"


def write_model(
    source: Source, job: ExportJob, folder: Path, context: JobContext
) -> dict[str, Any]:
    """A model folder for ``from_pretrained``: base and tuned weights in the run's dtype."""
    merged: dict[str, torch.Tensor] = {}
    with _tuned(source, job, context) as (loaded, _):
        merged = _merged(loaded.model)
        if not merged:
            _save(loaded, folder, context)
    if merged:  # the adapters' modules are gone by now
        with _replaced(loaded.model, merged):
            _save(loaded, folder, context)
    return {"dtype": loaded.dtype_name, "merged": bool(merged)}


def write_adapter(
    source: Source, job: ExportJob, folder: Path, context: JobContext
) -> dict[str, Any]:
    """An adapter folder for ``PeftModel.from_pretrained``; its tensors are the true weights."""
    with _tuned(source, job, context) as (loaded, scope):
        # peft has entered the modules' names, which depend on the family.
        model: Any = loaded.model
        config = copy.deepcopy(model.peft_config[ADAPTER])
        tensors = {
            f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.cpu().contiguous()
            for name, tensor in scope.master.items()
        }
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.base_model_name_or_path = loaded.info.path
    config.revision = source.job.revision
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return {"dtype": "float32", "rank": config.r, "alpha": config.lora_alpha}


@contextmanager
def _tuned(
    source: Source, job: ExportJob, context: JobContext
) -> Iterator[tuple[LoadedModel, TunedScope]]:
    """The model at the exported weights, for as long as the block lasts."""
    base = base_of(source.job, source.details)
    with reopened(source.job, job.device, base, context.log) as (loaded, scope):
        context.check_cancelled()
        scope.load(read_checkpoint(source.path).weights)
        yield loaded, scope


@torch.no_grad()
def _merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights with their adapters added in float32, by the parameter's name in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            weight = module.get_base_layer().weight
            delta = module.get_delta_weight(ADAPTER)  # type: ignore[attr-defined]
            found[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return found


@contextmanager
def _replaced(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Other values in some of a model's parameters, for as long as the block lasts."""
    parameters = {name: model.get_parameter(name) for name in tensors}
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


def _save(loaded: LoadedModel, folder: Path, context: JobContext) -> None:
    model: Any = loaded.model
    context.progress(0, 0, "writing the model")
    dtype = model.config.dtype
    try:
        model.save_pretrained(folder, max_shard_size=SHARD)
    finally:
        model.config.dtype = dtype  # saving makes it a string
    loaded.tokenizer.save_pretrained(folder)
