"""``attention:<k>`` and ``mlp:<k>``: one half of a decoder layer, found by its modules' names.

The layer's norms belong to neither.
"""

from zo_core.errors import UserError
from zo_core.models.load import LoadedModel
from zo_core.scope_spec import ScopeSpec
from zo_core.zo.scopes.selection import Selection, block_prefix, parameters_of

NAMES = {
    "attention": ("self_attn", "self_attention", "attn", "attention"),
    "mlp": ("mlp", "ffn", "feed_forward", "block_sparse_moe", "fc1", "fc2"),
}
"""Children of a block, by part. OPT hangs its MLP's two matrices directly into the block."""


def part_names(loaded: LoadedModel, layer: int, part: str) -> list[str]:
    """Names of the modules that make up a part of a layer, such as ``model.layers.3.mlp``.

    Raises:
        UserError: the layer has no module of a known name.
    """
    prefix = block_prefix(loaded, layer)
    children = [name for name, _ in loaded.decoder.blocks[layer].named_children()]
    found = [f"{prefix}{name}" for name in children if name in NAMES[part]]
    if not found:
        raise UserError(
            f"scope: no {part} was found in layer {layer} of {loaded.name}: its parts are "
            f"{', '.join(children)}. Choose layer:{layer}."
        )
    return found


def select(loaded: LoadedModel, spec: ScopeSpec, dominant: int | None, seed: int) -> Selection:
    """Every parameter of the part."""
    layer = spec.numbers[0]
    prefixes = [f"{name}." for name in part_names(loaded, layer, spec.form)]
    return Selection(parameters_of(loaded, *prefixes), lowest=layer, layer=layer)
