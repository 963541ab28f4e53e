"""``random-layer:<seed>``: the control of the dominant layer.

The rule: uniform over the layers of the model other than the one that the job's outlier rule names;
over all layers if it names none. The draw depends on the seed, that layer and the number of layers
alone, not on the run's seed.
"""

import hashlib
from dataclasses import replace

from zo_core.models.load import LoadedModel
from zo_core.scope_spec import ScopeSpec
from zo_core.zo.scopes import layer
from zo_core.zo.scopes.selection import Selection


def draw_layer(seed: int, count: int, dominant: int | None) -> int:
    """The layer that a seed draws from ``count`` layers without the dominant one."""
    candidates = [k for k in range(count) if k != dominant] or [0]
    digest = hashlib.blake2b(f"random-layer/{seed}".encode(), digest_size=8).digest()
    return candidates[int.from_bytes(digest, "little") % len(candidates)]


def select(loaded: LoadedModel, spec: ScopeSpec, dominant: int | None, seed: int) -> Selection:
    """One drawn layer, whole."""
    assert spec.seed is not None
    drawn = draw_layer(spec.seed, len(loaded.decoder), dominant)
    return layer.select(loaded, replace(spec, layers=(drawn,)), dominant, seed)
