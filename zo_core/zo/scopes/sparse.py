"""``sparse:<p>``: the smallest weights of every matrix (Sparse-MeZO, arXiv 2402.15751).

In each weight matrix (two or more dimensions, embeddings included) the p % entries of smallest
magnitude are tuned. The mask is that of the pre-trained weights and stays as it is; Sparse-MeZO
recomputes it from a fixed threshold at every step. Vectors (norms, biases) are not tuned.
"""

import torch

from zo_core.models.load import LoadedModel
from zo_core.scope_spec import ScopeSpec
from zo_core.zo.scopes.selection import Selection, parameters_of


def smallest(weight: torch.Tensor, percent: float) -> torch.Tensor:
    """Mask of the entries whose magnitude is at most that of the p %-th smallest.

    Entries equal to the threshold are all in, so ties (frequent in bfloat16) may exceed p %.
    """
    magnitude = weight.detach().abs().flatten()
    rank = max(1, round(len(magnitude) * percent / 100))
    threshold = magnitude.float().kthvalue(rank).values
    return weight.detach().abs().float() <= threshold


def select(loaded: LoadedModel, spec: ScopeSpec, dominant: int | None, seed: int) -> Selection:
    """Every matrix, masked."""
    assert spec.percent is not None
    matrices = {n: p for n, p in parameters_of(loaded, "").items() if p.dim() >= 2}
    masks = {n: smallest(p, spec.percent) for n, p in matrices.items()}
    return Selection(matrices, lowest=None, masks=masks)
