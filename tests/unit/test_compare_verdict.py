"""The decision rule: known effects, error rates under the null, and what it cannot say."""

from dataclasses import replace

import numpy as np
import pytest

from zo_core.compare.claims import claims_asked
from zo_core.compare.results import Results
from zo_core.compare.simulate import (
    LAYERS,
    TIED,
    WORST,
    hold_rate,
    results_of,
    simulated,
    spec_of,
)
from zo_core.compare.spec import CompareSpec
from zo_core.compare.verdict import Claim, verdict


def by_key(results: Results) -> dict[str, Claim]:
    return {claim.key: claim for claim in verdict(results)}


def test_everything_holds_where_the_dominant_layer_is_much_better() -> None:
    effects = {"layer:auto": 0.05, "all-but:auto": -0.05}
    claims = by_key(simulated(spec_of(8), effects, 0))
    assert {key: c.decision for key, c in claims.items() if key != "e"} == dict.fromkeys(
        "abcd", "holds"
    )
    assert claims["c"].numbers["rank"] == 1
    assert claims["a"].numbers["difference"] == pytest.approx(0.05, abs=0.02)
    assert "layer:auto-0" in claims["a"].run_ids
    assert "full-7" in claims["a"].run_ids


def test_nothing_holds_where_it_is_much_worse() -> None:
    effects = {"layer:auto": -0.05, "all-but:auto": 0.05}
    claims = by_key(simulated(spec_of(8), effects, 0))
    assert {claims[key].decision for key in "abcd"} == {"does not hold"}
    assert claims["c"].numbers["rank"] == LAYERS


def test_an_effect_within_the_margin_is_no_gain() -> None:
    """(b) and (d) ask for a difference: equal arms refute them once there are enough seeds."""
    claims = by_key(simulated(spec_of(16), {}, 4))
    assert claims["a"].decision == "holds", "not worse by a margin"
    assert claims["b"].decision == claims["d"].decision == "does not hold"


@pytest.mark.parametrize("units", [7, 10])
def test_false_holds_are_rare(units: int) -> None:
    """1000 data sets at the border of the null hypothesis: any of (a) to (d) *holds* in <= 5 %.

    The dominant layer is worse than everything else by exactly the margin, and the full model is no
    better without it: all four claims are false. Tolerance: 2 standard errors, 1.4 %.
    """
    assert hold_rate(spec_of(units), WORST, "abcd", 1000) <= 0.064


def test_false_best_layer_is_rare() -> None:
    """1000 data sets in which one other layer is as good: (c) *holds* in <= 5 % (+ 1.4 %)."""
    assert hold_rate(spec_of(8), TIED, "c", 1000) <= 0.064


def test_power_at_a_clear_effect() -> None:
    """A gain of two standard deviations of the difference, eight seeds: (b) *holds* in >= 90 %."""
    assert hold_rate(spec_of(8), {"layer:auto": 0.03}, "b", 100) >= 0.9


def test_speed_and_weights() -> None:
    claim = by_key(results_of(spec_of(8), lambda arm, i: 0.5 + 0.01 * i, speed=3.0))["e"]
    assert claim.decision == "undecided", "the ratio is equal in all pairs"
    rng = np.random.default_rng(0)
    results = simulated(spec_of(8), {}, 0)
    jitter = [
        m.steps_per_second * (3 if m.arm != "full" else 1) * rng.uniform(0.9, 1.1)
        for m in results.measurements
        if m.steps_per_second
    ]
    moved = [
        replace(m, steps_per_second=s) for m, s in zip(results.measurements, jitter, strict=True)
    ]
    claim = by_key(replace(results, measurements=moved))["e"]
    assert claim.decision == "holds"
    assert claim.numbers["speed_ratio"] == pytest.approx(3, rel=0.1)
    assert claim.numbers["tuned_share"] == pytest.approx(0.05)


def test_one_seed_is_undecided_with_the_reason() -> None:
    for claim in verdict(simulated(spec_of(1), {"layer:auto": 0.2}, 0)):
        assert claim.decision == "undecided"
        assert "one pair only" in claim.sentence


def test_equal_values_are_undecided_with_the_reason() -> None:
    for claim in verdict(results_of(spec_of(5), lambda arm, i: 0.5)):
        assert claim.decision == "undecided"
        assert "equal" in claim.sentence


def test_a_missing_cell_leaves_its_claims_undecided() -> None:
    whole = simulated(spec_of(8), {"layer:auto": 0.1, "all-but:auto": -0.1}, 0)
    values = {(m.arm, m.seed): m.value for m in whole.measurements}
    holed = results_of(
        whole.spec, lambda arm, i: None if (arm, i) == ("full", 2) else values[arm, i]
    )
    claims = by_key(holed)
    assert claims["a"].decision == claims["d"].decision == "undecided"
    assert "1 of 8 pairs" in claims["a"].sentence
    assert claims["b"].decision == "holds", "its arms are whole"


def test_few_seeds_say_how_many_more() -> None:
    claim = by_key(simulated(spec_of(3), {"layer:auto": 0.05}, 0))["b"]
    assert claim.decision == "undecided"
    assert claim.more_seeds == 4, "2^-7 is the first p that survives four claims"
    assert "needs about 4 more seeds" in claim.sentence
    three = by_key(simulated(spec_of(2, tasks=3), {"layer:auto": 0.05}, 0))["b"]
    assert three.more_seeds == 1, "a seed is a unit on each of three tasks"


def test_claims_without_their_arms_are_left_out() -> None:
    fields = {"arms": [{"name": n, "scope": n} for n in ("layer:auto", "random-layer:1")]}
    spec = CompareSpec.model_validate(fields | {"steps": 5, "seeds": [0, 1]})
    claims = verdict(results_of(spec, lambda arm, i: 0.5 + 0.1 * i * (arm == "layer:auto")))
    assert [c.key for c in claims] == claims_asked(spec) == ["b"]
    assert claims_asked(spec_of(2)) == list("abcde")


def test_nan_cells_are_missing_pairs() -> None:
    """A value that is not a number decides nothing, and is said."""
    whole = simulated(spec_of(8), {"layer:auto": 0.1}, 0)
    values = {(m.arm, m.seed): m.value for m in whole.measurements}
    nan = float("nan")
    holed = results_of(
        whole.spec, lambda arm, i: nan if (arm, i) == ("full", 2) else values[arm, i]
    )
    claim = by_key(holed)["a"]
    assert claim.decision == "undecided"
    assert "1 of 8 pairs have a run that is not finished or failed" in claim.sentence
