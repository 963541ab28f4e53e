"""``prefix``: prefix tuning, 5 virtual keys and values in front of every layer's attention.

After Li and Liang 2021 (arXiv 2101.00190), initialised as MeZO does: with the keys and values that
the model itself computes for 5 tokens, drawn from the vocabulary by the run's seed. They enter
every forward pass of the model through ``past_key_values``; real tokens count their positions
from 5.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from zo_core.errors import UserError
from zo_core.models.load import LoadedModel
from zo_core.models.memory import PREFIX_LENGTH
from zo_core.scope_spec import ScopeSpec
from zo_core.zo.scopes.selection import Selection


class _PrefixCache(DynamicCache):
    """A cache that shows its prefix and keeps nothing: a recomputed layer sees the same again."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix and new keys and values, [R, heads, 5 + T, width]."""
        kept: Any = self.layers[layer_idx]
        return (
            torch.cat([kept.keys, key_states], dim=-2),
            torch.cat([kept.values, value_states], dim=-2),
        )

    def show(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a layer's prefix in front of what comes."""
        super().update(keys, values, layer)


@torch.no_grad()
def _initial(loaded: LoadedModel, seed: int) -> dict[str, torch.Tensor]:
    """Name -> keys or values [1, heads, 5, width] of every layer for five drawn tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(loaded.info.vocab_size, (1, PREFIX_LENGTH), generator=generator)
    output = loaded.model(input_ids=tokens.to(loaded.device), use_cache=True)
    cache = output.past_key_values
    found: dict[str, torch.Tensor] = {}
    for layer, kept in enumerate(getattr(cache, "layers", [])):
        keys, values = getattr(kept, "keys", None), getattr(kept, "values", None)
        if keys is None or values is None or keys.shape[-2] != PREFIX_LENGTH:
            break
        name = f"{loaded.decoder.prefix}.{layer}.prefix"
        found |= {f"{name}.key": keys.clone(), f"{name}.value": values.clone()}
    if len(found) != 2 * len(loaded.decoder):
        raise UserError(
            f"scope: {loaded.name} does not keep keys and values for every layer, so it takes no "
            "prefix: choose another scope."
        )
    return found


def select(loaded: LoadedModel, spec: ScopeSpec, dominant: int | None, seed: int) -> Selection:
    """The virtual keys and values, and a hook that puts them before every forward pass."""
    parameters = _initial(loaded, seed)
    tensors = list(parameters.values())

    def enter(
        _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs["input_ids"]
        rows, width = ids.shape
        cache = _PrefixCache()
        for layer in range(len(loaded.decoder)):
            keys, values = tensors[2 * layer : 2 * layer + 2]
            cache.show(layer, keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(width, device=ids.device).expand(rows, -1)
        return args, {
            **kwargs,
            "past_key_values": cache,
            "attention_mask": torch.cat([mask.new_ones(rows, PREFIX_LENGTH), mask], dim=1),
            "position_ids": positions + PREFIX_LENGTH,
        }

    handle = loaded.model.register_forward_pre_hook(enter, with_kwargs=True)
    return Selection(parameters, lowest=None, positions=PREFIX_LENGTH, undo=handle.remove)
