"""``lora`` and ``lora:<k>``: low-rank adapters of q and v through peft, in all layers or in one.

``W x + (alpha / r) B A x`` (Hu et al. 2021, arXiv 2106.09685) with r 8, alpha 16, as MeZO uses it.
Which modules are q and v is peft's own mapping by model type; families with one fused matrix get
the adapter on it. A is uniform in ``+/- 1 / sqrt(inputs)`` (peft's Kaiming rule), B is 0, so the
model starts as it was. A depends on the run's seed and the parameter's name, not on the device.
"""

import hashlib
import math
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
from torch import nn

from zo_core.errors import UserError
from zo_core.models.load import LoadedModel
from zo_core.models.memory import LORA_RANK
from zo_core.scope_spec import ScopeSpec
from zo_core.zo.scopes.selection import Selection, block_prefix

ALPHA = 16
ADAPTER = "default"


def _config(loaded: LoadedModel, layer: int | None) -> LoraConfig:
    model_type = str(getattr(loaded.model.config, "model_type", ""))  # type: ignore[union-attr]
    if model_type not in TARGETS:
        raise UserError(
            f"scope: peft does not know which modules of a {model_type} model are q and v: choose "
            "layer:<k> or attention:<k>."
        )
    one_layer: dict[str, Any] = {}
    if layer is not None:
        block_prefix(loaded, layer)
        pattern = loaded.decoder.prefix.rpartition(".")[2]
        one_layer = {"layers_to_transform": [layer], "layers_pattern": pattern}
    return LoraConfig(
        r=LORA_RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=TARGETS[model_type],  # type: ignore[arg-type]
        fan_in_fan_out=model_type == "gpt2",
        **one_layer,
    )


@torch.no_grad()
def _initialise(parameters: dict[str, torch.Tensor], seed: int) -> None:
    for name, parameter in parameters.items():
        if ".lora_B." in name:
            parameter.zero_()
            continue
        digest = hashlib.blake2b(f"lora/{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        bound = 1 / math.sqrt(parameter.shape[1])
        values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(values)


def select(loaded: LoadedModel, spec: ScopeSpec, dominant: int | None, seed: int) -> Selection:
    """The adapters' matrices A [8, in] and B [out, 8]."""
    layer = spec.numbers[0] if spec.layers else None
    model: nn.Module = loaded.model
    config = _config(loaded, layer)

    def forget() -> None:
        if hasattr(model, "peft_config"):
            del model.peft_config

    try:
        injected = LoraModel(model, {ADAPTER: config}, ADAPTER)
    except ValueError as error:
        forget()
        raise UserError(
            f"scope: peft finds no q and v of {loaded.name} where it expects them: choose "
            "layer:<k> or attention:<k>."
        ) from error

    def undo() -> None:
        injected.unload()
        forget()

    parameters: dict[str, torch.Tensor] = {
        n: p for n, p in model.named_parameters() if ".lora_" in n
    }
    model.eval()
    model.requires_grad_(False)
    _initialise(parameters, seed)
    return Selection(parameters, lowest=layer or 0, layer=layer, undo=undo)
