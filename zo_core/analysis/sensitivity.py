"""Perturbation sensitivity of single layers: what does the loss do when one layer is perturbed?

For a layer, a draw of z (entries of variance 1) and a perturbation scale eps, mean over batches:

* ``projected_gradient``: ``g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)``, which is about
  ``z . grad L``; its mean square over draws estimates the squared gradient norm of the layer
  (Spall 1992).
* ``abs_projected_gradient``: ``|g|``, of the mean loss over batches.
* ``loss_shift``: mean of ``|L(theta +/- eps z) - L(theta)|``, in nats.
* ``output_kl``: mean over both signs and the scored places of
  ``KL(p(theta) || p(theta +/- eps z))`` of the next-token distribution, in nats.
* ``own_output_change``, ``final_output_change``: relative change (:mod:`zo_core.zo.layerwise`) of
  the perturbed layer's output and of the last block's, mean over both signs.

The same for a layer and every block j above it is the **propagation**: the relative change
``r(j|k)``, and the **amplification** ``r(j|k) / r(k|k)``, how much of the change at its own output
has grown on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import pandas as pd
import torch

from zo_core.zo.layerwise import LayerwiseBatch
from zo_core.zo.scope import Draw, Point, TunedScope

METRICS = (
    "projected_gradient",
    "abs_projected_gradient",
    "loss_shift",
    "output_kl",
    "own_output_change",
    "final_output_change",
)
CALIBRATED = 0.01
"""How close to its target a scaled layer's own output change is brought, relative."""
CALIBRATIONS = 6
"""Attempts at it; what is reached is measured and reported."""


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """How layers are probed."""

    draws: int
    eps: float
    noise: str
    seed: int
    eps_sweep: tuple[float, ...] = ()

    def draw(self, number: int) -> Draw:
        """The z of draw ``number``: that of step ``number + 1`` of a run with this seed."""
        return Draw(self.noise, self.seed, number + 1)


@dataclass(frozen=True, slots=True)
class Measured:
    """A pair of points, theta + eps z and theta - eps z, on one batch."""

    g: float
    loss_shift: float
    kl: float
    changes: list[float]
    """Relative change of the layer's output and of every block's above, mean over signs."""

    def values(self) -> dict[str, float]:
        """By name of the metric."""
        numbers = (self.g, abs(self.g), self.loss_shift, self.kl, self.changes[0], self.changes[-1])
        return dict(zip(METRICS, numbers, strict=True))


@torch.no_grad()
def measure(
    batch: LayerwiseBatch, layer: int, scope: TunedScope, draw: Draw, eps: float
) -> Measured:
    """Measure both points of a draw; leaves the working weights in an unspecified state."""
    plus, minus = batch.respond(layer, scope, (Point(draw, eps), Point(draw, -eps)))
    return Measured(
        g=(plus.loss - minus.loss) / (2 * eps),
        loss_shift=(abs(plus.loss - batch.loss) + abs(minus.loss - batch.loss)) / 2,
        kl=(plus.kl + minus.kl) / 2,
        changes=[(p + m) / 2 for p, m in zip(plus.changes, minus.changes, strict=True)],
    )


def _mean(found: Sequence[Measured]) -> Measured:
    """The same of the mean loss over batches."""
    return Measured(
        g=fmean(m.g for m in found),
        loss_shift=fmean(m.loss_shift for m in found),
        kl=fmean(m.kl for m in found),
        changes=[fmean(c) for c in zip(*(m.changes for m in found), strict=True)],
    )


@dataclass(slots=True)
class ProbeTables:
    """What a probe has found so far, as rows of its tables."""

    draws: list[tuple[int, int, str, float]] = field(default_factory=list)
    batches: list[tuple[int, int, int, float]] = field(default_factory=list)
    sweep: list[tuple[int, float, int, float, float, float, float]] = field(default_factory=list)
    scalings: list[tuple[int, str, float, int, str, float]] = field(default_factory=list)
    propagation: list[tuple[int, int, int, float]] = field(default_factory=list)

    def frames(self) -> dict[str, pd.DataFrame]:
        """The tables that have rows; ``propagation`` is already a mean over draws."""
        columns = {
            "draws": ["layer", "draw", "metric", "value"],
            "batches": ["layer", "draw", "batch", "projected_gradient"],
            "sweep": [
                "layer",
                "eps",
                "draw",
                "projected_gradient",
                "loss_shift",
                "output_kl",
                "own_output_change",
            ],
            "scalings": ["layer", "scaling", "factor", "draw", "metric", "value"],
            "propagation": ["layer", "block", "draw", "relative_change"],
        }
        frames = {
            name: pd.DataFrame(rows, columns=columns[name])
            for name in columns
            if (rows := getattr(self, name))
        }
        if "propagation" in frames:
            frames["propagation"] = propagate(frames["propagation"])
        return frames


@torch.no_grad()
def probe_layer(
    batches: Sequence[LayerwiseBatch],
    layer: int,
    scope: TunedScope,
    settings: ProbeSettings,
    factors: Mapping[str, float],
    tables: ProbeTables,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Probe one layer; the caller closes the scope, which restores the weights bit for bit.

    Args:
        batches: the batches.
        layer: 0-based.
        scope: of that layer's parameters.
        settings: draws, eps and so on. The sweep is of the first batch.
        factors: name of a scaling -> what eps is multiplied with in this layer.
        tables: receives the rows.
        tick: called after every pair of points; may raise to stop.
    """
    for number in range(settings.draws):
        draw = settings.draw(number)  # z is made once where it can be held

        def over_batches(eps: float, draw: Draw = draw) -> list[Measured]:
            found = []
            for batch in batches:
                found.append(measure(batch, layer, scope, draw, eps))
                tick()
            return found

        found = over_batches(settings.eps)
        plain = _mean(found)
        tables.draws += [(layer, number, m, v) for m, v in plain.values().items()]
        tables.batches += [(layer, number, i, m.g) for i, m in enumerate(found)]
        tables.propagation += [
            (layer, layer + above, number, change) for above, change in enumerate(plain.changes)
        ]
        for scaling, factor in factors.items():
            scaled = plain if factor == 1.0 else _mean(over_batches(settings.eps * factor))
            _keep(tables, layer, scaling, factor, number, scaled)
        for eps in settings.eps_sweep:
            if eps == settings.eps:
                at = found[0]
            else:
                at = measure(batches[0], layer, scope, draw, eps)
                tick()
            tables.sweep.append((layer, eps, number, at.g, at.loss_shift, at.kl, at.changes[0]))


def _keep(
    tables: ProbeTables, layer: int, scaling: str, factor: float, draw: int, found: Measured
) -> None:
    tables.scalings += [
        (layer, scaling, factor, draw, metric, value) for metric, value in found.values().items()
    ]


@torch.no_grad()
def equalise_layer(
    batches: Sequence[LayerwiseBatch],
    layer: int,
    scope: TunedScope,
    settings: ProbeSettings,
    target: float,
    tables: ProbeTables,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Probe one layer with every draw scaled so that its own output changes by ``target``.

    What a layer's place adds is so told from how strongly its own output reacts: all layers start
    with the same relative change, and what reaches the loss differs by the way from there.

    Arguments as of :func:`probe_layer`, which has put the unscaled changes into ``tables``. The
    factor of a draw is found by running the layer alone, on the first batch.
    """
    start = {d: v for k, d, m, v in tables.draws if k == layer and m == "own_output_change"}
    for number in range(settings.draws):
        draw = settings.draw(number)
        # Where most layers change nothing at this eps there is nothing to make equal.
        factor = target / start[number] if target and start[number] else 1.0
        for _ in range(CALIBRATIONS if target else 0):
            eps = settings.eps * factor
            reached = batches[0].own_change(layer, scope, (Point(draw, eps), Point(draw, -eps)))
            if not reached or abs(reached / target - 1) <= CALIBRATED:
                break
            factor *= target / reached
        found = []
        for batch in batches:
            found.append(measure(batch, layer, scope, draw, settings.eps * factor))
            tick()
        _keep(tables, layer, "output", factor, number, _mean(found))


def common_target(tables: ProbeTables) -> float:
    """The change that all layers are scaled to: the median over layers of their mean own change."""
    draws = pd.DataFrame(tables.draws, columns=["layer", "draw", "metric", "value"])
    own = draws[draws["metric"] == "own_output_change"]
    return float(own.groupby("layer")["value"].mean().median())


def summarise(draws: pd.DataFrame, by: Sequence[str] = ("layer", "metric")) -> pd.DataFrame:
    """Mean, standard deviation and standard error of ``value`` over draws.

    Returns:
        ``*by, mean, sd, se, n``; ``sd`` and ``se`` are NaN for a single draw.
    """
    table = draws.groupby(list(by))["value"].agg(mean="mean", sd="std", n="count").reset_index()
    table["se"] = table["sd"] / np.sqrt(table["n"])
    return table[[*by, "mean", "sd", "se", "n"]]


def propagate(changes: pd.DataFrame) -> pd.DataFrame:
    """The propagation matrix in long form.

    Args:
        changes: ``layer, block, draw, relative_change``.

    Returns:
        ``layer`` (perturbed), ``block`` (measured, from ``layer`` on), ``relative_change`` (mean
        over draws), ``sd``, ``n``, and ``amplification``: the mean relative change over that of
        the perturbed layer's own output.
    """
    table = (
        changes.groupby(["layer", "block"])["relative_change"]
        .agg(["mean", "std", "count"])
        .reset_index()
        .set_axis(["layer", "block", "relative_change", "sd", "n"], axis=1)
    )
    own = table[table["layer"] == table["block"]].set_index("layer")["relative_change"]
    table["amplification"] = table["relative_change"] / table["layer"].map(own)
    return table
