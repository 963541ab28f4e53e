"""``layer:<k>`` and ``layers:<list>``: whole decoder layers."""

from zo_core.models.load import LoadedModel
from zo_core.scope_spec import ScopeSpec
from zo_core.zo.scopes.selection import Selection, block_prefix, parameters_of


def select(loaded: LoadedModel, spec: ScopeSpec, dominant: int | None, seed: int) -> Selection:
    """Every parameter of the named layers."""
    layers = spec.numbers
    prefixes = [block_prefix(loaded, k) for k in layers]
    return Selection(
        parameters_of(loaded, *prefixes),
        lowest=min(layers),
        layer=layers[0] if len(layers) == 1 else None,
    )
