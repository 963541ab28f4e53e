"""The verdict's error rates and power on simulated comparisons.

``python -m zo_core.compare.simulate [--repetitions 1000]`` prints the table of docs/compare.md.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from zo_core.compare.results import Measurement, Results
from zo_core.compare.spec import CompareSpec
from zo_core.compare.verdict import verdict

DOMINANT = 3
LAYERS = 6
UNIT_SD = 0.05
"""Standard deviation of what the arms of a unit share."""
OWN_SD = 0.01
"""Of what each arm has to itself: a difference of two arms has sqrt(2) times as much."""
MARGIN = 0.01
WORST = {"layer:auto": -MARGIN}
"""The border of the null hypotheses: (a) to (d) are all just false."""
TIED = {f"layer:{k}": -0.1 for k in range(1, LAYERS)} | {"layer:0": 0.0, "layer:auto": 0.0}
"""One other layer is as good as the dominant one: (c) is just false."""


def spec_of(seeds: int, tasks: int = 1) -> CompareSpec:
    """A comparison that asks for all claims, with six single layers."""
    scopes = ["full", "all-but:auto", "layer:auto", "random-layer:{seed}"]
    scopes += [f"layer:{k}" for k in range(LAYERS) if k != DOMINANT]
    return CompareSpec.model_validate(
        {
            "arms": [{"name": s.partition("{")[0], "scope": s} for s in scopes],
            "tasks": ["reviews", "sst2", "rte"][:tasks],
            "seeds": list(range(seeds)),
            "steps": 10,
            "margin": MARGIN,
        }
    )


def results_of(
    spec: CompareSpec, value: Callable[[str, int], float | None], speed: float = 2.0
) -> Results:
    """Results whose values are ``value(arm, unit)``; None: the run failed."""
    found = []
    for i, (task, seed) in enumerate((t, s) for t in spec.tasks for s in spec.seeds):
        for arm in spec.arms:
            facts: dict[str, Any] = {"dominant": DOMINANT} if "auto" in arm.scope else {}
            v = value(arm.name, i)
            found.append(
                Measurement(
                    task,
                    arm.name,
                    seed,
                    "failed" if v is None else "done",
                    run_id=f"{arm.name}-{i}",
                    value=v,
                    steps_per_second=(1.0 if arm.scope == "full" else speed) * (1 + 0.01 * i),
                    tuned_parameters=100 if arm.scope == "full" else 5,
                    **facts,
                )
            )
    order = [arm.name for arm in spec.arms]
    found.sort(key=lambda m: order.index(m.arm))
    return Results(spec, found)


def simulated(spec: CompareSpec, effects: Mapping[str, float], seed: int) -> Results:
    """Arms with a normal part that a unit shares, one of their own, and a known effect."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0.8, UNIT_SD, len(spec.seeds) * len(spec.tasks))
    noise = {arm.name: rng.normal(0, OWN_SD, len(common)) for arm in spec.arms}
    return results_of(
        spec,
        lambda arm, i: float(common[i] + noise[arm][i] + effects.get(arm, 0.0)),
        speed=1.0,
    )


def hold_rate(
    spec: CompareSpec, effects: Mapping[str, float], keys: str, repetitions: int
) -> float:
    """Share of simulated comparisons in which any of the claims ``keys`` *holds*."""
    return float(
        np.mean(
            [
                any(
                    claim.decision == "holds" and claim.key in keys
                    for claim in verdict(simulated(spec, effects, seed))
                )
                for seed in range(repetitions)
            ]
        )
    )


def table(repetitions: int) -> str:
    """Error rates and power by number of units, as Markdown."""
    lines = [
        "| units | false: any of (a) to (d) | false: (c), one layer ties | power (a), equal arms | "
        "power (b), +1 point | power (b), +2 points |",
        "|---|---|---|---|---|---|",
    ]
    for units in (6, 7, 8, 10, 15, 30):
        spec = spec_of(units)
        rates = [
            hold_rate(spec, effects, keys, repetitions)
            for effects, keys in (
                (WORST, "abcd"),
                (TIED, "c"),
                ({}, "a"),
                ({"layer:auto": 0.01}, "b"),
                ({"layer:auto": 0.02}, "b"),
            )
        ]
        lines.append(f"| {units} | " + " | ".join(f"{100 * r:.1f} %" for r in rates) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=1000)
    print(table(parser.parse_args().repetitions))
