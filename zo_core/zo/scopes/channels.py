"""``channels:<k>:top<p>%`` and ``rest<p>%``: outlier MLP channels of a layer, or all but them.

A channel is one intermediate neuron of the MLP: a row of the gate and up projections (and an entry
of their biases) and a column of the down projection. Outlier channels are those with the largest
``max |input of the down projection|`` over the bundled scan text (8 passages of 128 tokens, what
the outlier rules look at). ``rest`` is the whole layer minus exactly those entries.
"""

from dataclasses import dataclass

import torch
from torch import nn

from zo_core.errors import UserError
from zo_core.jobs import ScanJob
from zo_core.models.load import LoadedModel
from zo_core.scope_spec import ScopeSpec
from zo_core.tasks.texts import texts_of, tokenise
from zo_core.zo.scopes.part import part_names
from zo_core.zo.scopes.selection import Selection, block_prefix, parameters_of

UP = ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h")
DOWN = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h")


@dataclass(frozen=True, slots=True)
class _Mlp:
    """The projections of one MLP, by full name."""

    up: dict[str, nn.Module]
    down: tuple[str, nn.Module]
    width: int
    """Number of channels."""


def _sides(module: nn.Module) -> tuple[int, int]:
    """Dimension of the weight that holds inputs, and the one that holds outputs.

    GPT-2's Conv1D keeps [in, out], everyone else [out, in].
    """
    return (0, 1) if type(module).__name__ == "Conv1D" else (1, 0)


def _find_mlp(loaded: LoadedModel, layer: int) -> _Mlp:
    up: dict[str, nn.Module] = {}
    down: list[tuple[str, nn.Module]] = []
    for part in part_names(loaded, layer, "mlp"):
        for inner, module in loaded.model.get_submodule(part).named_modules():
            name = f"{part}.{inner}" if inner else part
            last = name.rpartition(".")[2]
            if getattr(module, "weight", None) is None or module.weight.dim() != 2:  # type: ignore[operator]
                continue
            if last in UP:
                up[name] = module
            elif last in DOWN:
                down.append((name, module))
    if not up or len(down) != 1:
        raise UserError(
            f"scope: the MLP of layer {layer} of {loaded.name} is not one up and one down "
            f"projection (a mixture of experts?), so it has no channels: choose mlp:{layer}."
        )
    weight = down[0][1].weight
    assert isinstance(weight, torch.Tensor)
    return _Mlp(up, down[0], weight.shape[_sides(down[0][1])[0]])


@torch.no_grad()
def channel_magnitudes(loaded: LoadedModel, layer: int) -> torch.Tensor:
    """Largest |input of the down projection| of every MLP channel on the bundled scan text.

    Returns:
        float32 [channels], on the CPU.
    """
    mlp = _find_mlp(loaded, layer)
    job = ScanJob(model=loaded.name, sequences=8, max_tokens=128)
    largest = torch.zeros(mlp.width, device=loaded.device)

    def see(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen = args[0].detach().float().abs().flatten(0, -2).amax(0)
        torch.maximum(largest, seen, out=largest)

    handle = mlp.down[1].register_forward_pre_hook(see)
    try:
        longest = min(job.max_tokens, loaded.context)
        for ids in tokenise(texts_of(job), loaded.tokenizer, job.bos, longest):
            # One text at a time: no padding that would have to be left out.
            batch = torch.tensor([ids], device=loaded.device)
            loaded.model.base_model(input_ids=batch, use_cache=False)  # type: ignore[operator]
    finally:
        handle.remove()
    return largest.cpu()


def _channel_masks(
    loaded: LoadedModel, layer: int, percent: float
) -> tuple[_Mlp, dict[str, torch.Tensor]]:
    """Masks of the top channels' entries, by parameter name."""
    mlp = _find_mlp(loaded, layer)
    magnitudes = channel_magnitudes(loaded, layer)
    count = max(1, round(mlp.width * percent / 100))
    chosen = torch.zeros(mlp.width, dtype=torch.bool)
    chosen[magnitudes.sort(descending=True, stable=True).indices[:count]] = True
    chosen = chosen.to(loaded.device)
    masks: dict[str, torch.Tensor] = {}

    def spread(name: str, module: nn.Module, side: int) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        length = weight.shape[side]
        if length % mlp.width:
            raise UserError(
                f"scope: {name} has {length} rows, which are not those of {mlp.width} channels: "
                f"choose mlp:{layer}."
            )
        # A fused gate_up_proj stacks the gates of all channels above their ups.
        along = chosen.repeat(length // mlp.width)
        shape = [1, 1]
        shape[side] = length
        masks[f"{name}.weight"] = along.view(shape).expand(weight.shape).contiguous()
        bias = getattr(module, "bias", None)
        if bias is not None and side == _sides(module)[1]:
            masks[f"{name}.bias"] = along.clone()

    for name, module in mlp.up.items():
        spread(name, module, _sides(module)[1])
    name, module = mlp.down
    spread(name, module, _sides(module)[0])
    return mlp, masks


def select(loaded: LoadedModel, spec: ScopeSpec, dominant: int | None, seed: int) -> Selection:
    """The entries of the top channels, or every other entry of the layer."""
    assert spec.percent is not None
    layer = spec.numbers[0]
    block = parameters_of(loaded, block_prefix(loaded, layer))
    _, masks = _channel_masks(loaded, layer, spec.percent)
    if not spec.rest:
        block = {n: p for n, p in block.items() if n in masks}
    else:
        masks = {n: ~mask for n, mask in masks.items()}
    return Selection(block, lowest=layer, masks=masks, layer=layer)
