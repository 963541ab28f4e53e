"""Fair perturbations: by how much eps is scaled in a layer, so that layers can be compared.

With one eps for all, a layer of more parameters moves further, and one of small weights moves by a
larger share of them. ``d_k`` is the number of parameters of layer k, ``w_k`` the root mean square
of its weights:

* ``count``: eps / sqrt(d_k), times the root of the mean d over the model's layers. The
  perturbation has the same norm in every layer: ``eps sqrt(mean d)``.
* ``rms``: eps w_k, over the mean w of the model's layers. Every layer moves by the same share of
  its weights.
* ``output``: found by measuring, draw by draw; see
  :func:`zo_core.analysis.sensitivity.equalise_layer`.

All are normalised so that a model whose layers are alike keeps its eps.
"""

import math

import pandas as pd
import torch

from zo_core.models.load import LoadedModel
from zo_core.zo.scope import scope_parameters

FIXED = ("count", "rms")
"""Scalings whose factors are known before anything is measured."""


@torch.no_grad()
def scale_factors(loaded: LoadedModel) -> pd.DataFrame:
    """The factors of eps by layer.

    Returns:
        ``layer, parameters, weight_rms, count, rms``, one row a layer of the model.
    """
    rows = []
    for layer in range(len(loaded.decoder)):
        tensors = scope_parameters(loaded, layer).values()
        size = sum(t.numel() for t in tensors)
        total = sum(float(torch.linalg.vector_norm(t, dtype=torch.float32)) ** 2 for t in tensors)
        rows.append((layer, size, math.sqrt(total / size)))
    table = pd.DataFrame(rows, columns=["layer", "parameters", "weight_rms"])
    table["count"] = (table["parameters"].mean() / table["parameters"]) ** 0.5
    table["rms"] = table["weight_rms"] / table["weight_rms"].mean()
    return table
