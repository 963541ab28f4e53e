"""Perturbation sensitivity of single layers: what does the loss do when one layer is perturbed?

For a layer and a draw of z (all entries of variance 1), on one fixed batch:

* ``projected_gradient``: ``g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)``, which is about
  ``z . grad L``; its mean square over draws estimates the squared gradient norm of the layer
  (Spall 1992).
* ``abs_projected_gradient``: ``|g|``.
* ``loss_shift``: mean of ``|L(theta +/- eps z) - L(theta)|``, in nats.
* ``output_kl``: mean over both signs and the scored places of
  ``KL(p(theta) || p(theta +/- eps z))`` of the next-token distribution, in nats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import task_loss
from zo_core.tasks.templates import Example
from zo_core.zo.path import choose_forward
from zo_core.zo.scope import Draw, Point, TunedScope, scope_parameters

METRICS = ("projected_gradient", "abs_projected_gradient", "loss_shift", "output_kl")


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """How a layer is probed."""

    draws: int
    eps: float
    noise: str
    seed: int


@torch.no_grad()
def probe_layer(
    loaded: LoadedModel,
    layer: int,
    examples: Sequence[Example],
    settings: ProbeSettings,
    path: str = "fast",
    tick: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Probe one layer; the model is left as it was, bit for bit.

    Args:
        loaded: the model.
        layer: 0-based.
        examples: one batch.
        settings: draws, eps, noise, seed. Draw d uses the z of step d + 1.
        path: ``fast`` or ``reference``, see :func:`zo_core.zo.path.choose_forward`.
        tick: called after every draw; may raise to stop.

    Returns:
        ``layer, draw, metric, value``, ``draws x len(METRICS)`` rows.
    """
    forward, _ = choose_forward(loaded, path, layer, examples)
    prepared = forward.prepare(examples)
    scope = TunedScope(scope_parameters(loaded, layer))
    rows = []
    try:
        base_logits = forward.logits(prepared)
        base_loss = float(task_loss(base_logits, prepared.scored))
        base = base_logits.float().log_softmax(-1)
        for number in range(settings.draws):
            draw = Draw(settings.noise, settings.seed, number + 1)
            losses, divergences = [], []
            pair = (Point(draw, settings.eps), Point(draw, -settings.eps))
            for logits in forward.logits_at(prepared, scope, pair):
                losses.append(float(task_loss(logits, prepared.scored)))
                other = logits.float().log_softmax(-1)
                divergences.append(float((base.exp() * (base - other)).sum(-1).mean()))
            g = (losses[0] - losses[1]) / (2 * settings.eps)
            values = (
                g,
                abs(g),
                sum(abs(loss - base_loss) for loss in losses) / 2,
                sum(divergences) / 2,
            )
            rows += [(layer, number, m, v) for m, v in zip(METRICS, values, strict=True)]
            tick()
    finally:
        scope.close()
    return pd.DataFrame(rows, columns=["layer", "draw", "metric", "value"])


def summarise(draws: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and standard error over draws.

    Returns:
        ``layer, metric, mean, sd, se, n``; ``sd`` and ``se`` are NaN for a single draw.
    """
    table = (
        draws.groupby(["layer", "metric"])["value"]
        .agg(mean="mean", sd="std", n="count")
        .reset_index()
    )
    table["se"] = table["sd"] / table["n"].map(math.sqrt)
    return table[["layer", "metric", "mean", "sd", "se", "n"]]
