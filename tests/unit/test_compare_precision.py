"""Does arithmetic in place change the picture: known effects, and what cannot be told."""

from collections.abc import Callable

import numpy as np
import pytest

from zo_core.compare.precision import precision_table
from zo_core.compare.results import Measurement, Results
from zo_core.compare.spec import CompareSpec

SEEDS = 10
PLACE = {"precision": "inplace", "dtype": "float16"}


def results(value: Callable[[str, int], float | None]) -> Results:
    arms = [
        {"name": "full", "scope": "full"},
        {"name": "layer:3", "scope": "layer:3"},
        {"name": "full fp16", "scope": "full"} | PLACE,
        {"name": "dominant fp16", "scope": "layer:auto"} | PLACE,
        {"name": "layer 5 fp16", "scope": "layer:5"} | PLACE,
    ]
    spec = CompareSpec.model_validate({"arms": arms, "seeds": list(range(SEEDS)), "steps": 4})
    return Results(
        spec,
        [
            Measurement("reviews", a.name, s, "done", value=value(a.name, s), dominant=3)
            for a in spec.arms
            for s in spec.seeds
        ],
    )


def noisy(effects: dict[str, float]) -> Results:
    rng = np.random.default_rng(0)
    noise = {name: rng.normal(0.7, 0.002, SEEDS) for name in ("full", "layer:3", *effects)}
    return results(lambda a, s: float(noise.get(a, noise["full"])[s] + effects.get(a, 0.0)))


def test_a_loss_in_place_is_found_and_the_lead_with_it() -> None:
    table = precision_table(noisy({"full fp16": 0.0, "dominant fp16": -0.05}))
    assert list(table["what"]) == [
        "full fp16 minus full",
        "dominant fp16 minus layer:3",
        "lead of the dominant layer over full",
    ], "an arm without a counterpart asks nothing; auto is layer 3"
    assert list(table["finding"]) == ["no change beyond the margin", "changes", "changes"]
    assert table["difference"].iloc[2] == pytest.approx(-0.05, abs=0.01)
    assert (table["pairs"] == SEEDS).all()


def test_what_cannot_be_told_says_so() -> None:
    equal = precision_table(results(lambda arm, seed: 0.5))
    assert set(equal["finding"]) == {"all pairs are equal"}
    missing = precision_table(results(lambda arm, seed: None if "fp16" in arm else 0.5))
    assert set(missing["finding"]) == {"no pair of finished runs"}
    rng = np.random.default_rng(1)
    wide = precision_table(results(lambda arm, seed: float(rng.normal(0.5, 0.1))))
    assert set(wide["finding"]) == {"no change shown"}
