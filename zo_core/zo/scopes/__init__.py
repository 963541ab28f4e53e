"""Scopes: which tensors, and which of their entries, a run tunes. One small file a form.

The names and their grammar are in :mod:`zo_core.scope_spec`. To add a form: give it a pattern
there, copy ``full.py``, and enter its ``select`` here.
"""

from collections.abc import Callable

from zo_core.models.load import LoadedModel
from zo_core.scope_spec import ScopeSpec
from zo_core.zo.scopes import (
    all_but,
    channels,
    full,
    layer,
    lora,
    part,
    prefix,
    random_layer,
    sparse,
)
from zo_core.zo.scopes.selection import Selection

SELECT: dict[str, Callable[[LoadedModel, ScopeSpec, int | None, int], Selection]] = {
    "full": full.select,
    "layer": layer.select,
    "layers": layer.select,
    "attention": part.select,
    "mlp": part.select,
    "channels": channels.select,
    "all-but": all_but.select,
    "random-layer": random_layer.select,
    "lora": lora.select,
    "sparse": sparse.select,
    "prefix": prefix.select,
}


def select(
    loaded: LoadedModel, spec: ScopeSpec, dominant: int | None = None, seed: int = 0
) -> Selection:
    """The tensors that a scope stands for on a loaded model.

    Args:
        loaded: the model; ``lora`` and ``prefix`` change its modules until the selection is closed.
        spec: the scope.
        dominant: what ``auto`` stands for, and what ``random-layer`` leaves out.
        seed: the run's seed, for the initial values of ``lora`` and ``prefix``.

    Raises:
        UserError: the model has no such layer, or no such part.
    """
    return SELECT[spec.form](loaded, spec.resolve(dominant), dominant, seed)
