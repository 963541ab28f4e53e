"""``full``: every parameter, embeddings and output head included, as MeZO does."""

from zo_core.models.load import LoadedModel
from zo_core.scope_spec import ScopeSpec
from zo_core.zo.scopes.selection import Selection, parameters_of


def select(loaded: LoadedModel, spec: ScopeSpec, dominant: int | None, seed: int) -> Selection:
    """Every parameter; a tied embedding counts once."""
    return Selection(parameters_of(loaded, ""), lowest=None)
