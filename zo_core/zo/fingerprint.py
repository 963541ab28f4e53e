"""Short digests by which a run knows its data and its base weights again."""

import hashlib
from collections.abc import Iterable

from zo_core.models.load import LoadedModel
from zo_core.zo.scope import TunedScope


def digest(parts: Iterable[object]) -> str:
    """16 hex digits of anything that can be printed."""
    text = "\n".join(map(str, parts))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def base_weights(loaded: LoadedModel, scope: TunedScope) -> str:
    """A digest of the weights that a scope starts from: sums of tensors, to seven digits.

    Args:
        loaded: the model, with the scope's adapters if it has any.
        scope: holds the base weights.
    """
    # The initial adapters say nothing of the model they are added to.
    adapters = any(".lora_" in name for name in scope.master)
    weights = loaded.model.parameters() if adapters else scope.master.values()
    sums = (w.double().sum().item() for w in weights)
    return digest(f"{s:.6e}" for s in sums)
