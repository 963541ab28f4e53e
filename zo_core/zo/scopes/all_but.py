"""``all-but:<k>``: the full model without one decoder layer."""

from zo_core.models.load import LoadedModel
from zo_core.scope_spec import ScopeSpec
from zo_core.zo.scopes.selection import Selection, block_prefix, parameters_of


def select(loaded: LoadedModel, spec: ScopeSpec, dominant: int | None, seed: int) -> Selection:
    """Every parameter that is not the layer's, embeddings included."""
    left_out = block_prefix(loaded, spec.numbers[0])
    everything = parameters_of(loaded, "")
    return Selection(
        {n: p for n, p in everything.items() if not n.startswith(left_out)}, lowest=None
    )
