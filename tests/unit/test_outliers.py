"""The outlier rules on synthetic layer tables, and the sentences they give."""

import math
from collections.abc import Sequence

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_core.analysis.outliers import RULES, first_outlier_layer

EMERGENCE = RULES["emergence"].parameters
PERSIST = int(EMERGENCE["persist"])
NAN = math.nan
RATIOS = ("emergence", "massive", "systematic")
"""The rules that compare top-1 with another statistic of its own layer."""


def table(
    top1: Sequence[float],
    median: Sequence[float] | float = 1.0,
    mean: Sequence[float] | float = 1.0,
    embedding: float | None = 1.0,
) -> pd.DataFrame:
    """A layer table; ``embedding`` is the top-1 of layer -1, None for a table without it."""
    rows = pd.DataFrame({"layer": range(len(top1)), "top1": top1, "median": median, "mean": mean})
    if embedding is None:
        return rows
    first = pd.DataFrame({"layer": [-1], "top1": [embedding], "median": 1.0, "mean": 1.0})
    return pd.concat([first, rows], ignore_index=True)


@st.composite
def planted(draw: st.DrawFn) -> tuple[pd.DataFrame, int]:
    """A table that jumps at a drawn layer and stays, and the layer."""
    layers = draw(st.integers(PERSIST + 1, 40))
    jump = draw(st.integers(0, layers - 1 - PERSIST))
    medians = draw(st.lists(st.floats(0.1, 10), min_size=layers, max_size=layers))
    quiet = st.floats(1, 49)
    height = draw(st.floats(100, 1e6)) * 10  # over the ratio at any median
    ratios = [draw(quiet) for _ in range(jump)]
    top1 = [r * m for r, m in zip(ratios, medians, strict=False)]
    held = st.floats(height / 2, height * 4)
    top1 += [height, *(draw(held) for _ in range(layers - 1 - jump))]
    return table(top1, medians, [2 * m for m in medians], draw(quiet)), jump


@given(planted())
def test_emergence_finds_the_planted_layer(case: tuple[pd.DataFrame, int]) -> None:
    layers, jump = case
    verdict = first_outlier_layer("emergence", layers)
    assert verdict.layer == jump, verdict.reason
    assert f"the median of layer {jump}" in verdict.reason
    assert verdict.parameters == EMERGENCE


@given(planted(), st.integers(-40, 40))
def test_scale_of_the_magnitudes_does_not_matter(
    case: tuple[pd.DataFrame, int], exponent: int
) -> None:
    """A power of two, so that rounding cannot tip a value over a threshold."""
    layers, _ = case
    scaled = layers.copy()
    scaled[["top1", "median", "mean"]] *= 2.0**exponent
    for rule in ("emergence", "systematic"):
        assert first_outlier_layer(rule, scaled).layer == first_outlier_layer(rule, layers).layer


@settings(max_examples=20)
@given(planted(), st.randoms(use_true_random=False))
def test_order_of_the_rows_does_not_matter(case: tuple[pd.DataFrame, int], draw: object) -> None:
    layers, _ = case
    order = list(layers.index)
    draw.shuffle(order)  # type: ignore[attr-defined]
    shuffled = layers.loc[order]
    for rule in RULES:
        assert first_outlier_layer(rule, shuffled) == first_outlier_layer(rule, layers)


@given(planted(), st.integers(0, 39))
def test_later_layers_do_not_change_what_was_found(
    case: tuple[pd.DataFrame, int], more: int
) -> None:
    """A verdict at layer k depends on the layers through k + persist alone."""
    layers, jump = case
    cut = layers[layers["layer"] <= jump + PERSIST + more]
    assert first_outlier_layer("emergence", cut).layer == jump


@given(planted(), st.floats(1.0, 1e4), st.floats(1.0, 1e4))
def test_massive_is_the_first_layer_over_both_thresholds(
    case: tuple[pd.DataFrame, int], magnitude: float, ratio: float
) -> None:
    layers, _ = case
    blocks = layers[layers["layer"] >= 0]
    hits = [
        int(row.layer)
        for row in blocks.itertuples()
        if row.top1 > magnitude and row.top1 / row.median >= ratio
    ]
    verdict = first_outlier_layer("massive", layers, magnitude=magnitude, ratio=ratio)
    assert verdict.layer == (hits[0] if hits else None)
    assert verdict.parameters == {"magnitude": magnitude, "ratio": ratio}
    relative = [int(r.layer) for r in blocks.itertuples() if r.top1 / r.mean > ratio]
    found = first_outlier_layer("systematic", layers, ratio=ratio).layer
    assert found == (relative[0] if relative else None)


@given(st.integers(8, 60), st.floats(1.15, 1.95))
def test_gradual_growth_is_ill_defined(layers: int, growth: float) -> None:
    """Every layer is less than twice the one before: nowhere does it emerge."""
    top1 = [90 * growth**k for k in range(1, layers + 1)]
    verdict = first_outlier_layer("emergence", table(top1, embedding=90.0))
    assert verdict.layer is None
    assert verdict.reason.startswith("Ill-defined")
    assert verdict.state == "ill-defined"
    assert "grows gradually" in verdict.reason
    assert verdict.numbers["largest_step"] == pytest.approx(growth)
    first = next(k for k, value in enumerate(top1) if value >= EMERGENCE["ratio"])
    assert f"at layer {first}," in verdict.reason


@pytest.mark.parametrize("rule", RATIOS)
def test_none_found_says_what_comes_closest(rule: str) -> None:
    verdict = first_outlier_layer(rule, table([5, 7, 40, 9]))
    assert verdict.layer is None
    assert verdict.reason.startswith("None found")
    assert "40 x the" in verdict.reason
    assert "layer 2" in verdict.reason


def test_a_spike_that_does_not_last_is_ill_defined() -> None:
    verdict = first_outlier_layer("emergence", table([5, 900, 5, 5, 5, 5]))
    assert verdict.layer is None
    assert "does not last" in verdict.reason
    later = first_outlier_layer("emergence", table([5, 400, 5, 900, 900, 900, 900]))
    assert later.layer == 3, "a later layer that stays is named"


@pytest.mark.parametrize("back", range(1, PERSIST + 1))
def test_the_last_layers_cannot_show_that_they_stay(back: int) -> None:
    layers = table([5.0] * (10 - back) + [900.0] * back)
    assert first_outlier_layer("emergence", layers).layer is None
    assert first_outlier_layer("emergence", layers, persist=back - 1).layer == 10 - back
    assert first_outlier_layer("massive", layers, ratio=900).layer == 10 - back


def test_half_is_enough_to_stay() -> None:
    assert first_outlier_layer("emergence", table([5, 900, 450, 450, 450])).layer == 1
    assert first_outlier_layer("emergence", table([5, 900, 450, 450, 449])).layer is None


def test_embedding_output_is_an_earlier_layer_and_never_named() -> None:
    top1 = [900.0] * 6
    assert first_outlier_layer("emergence", table(top1, embedding=None)).layer == 0
    assert first_outlier_layer("emergence", table(top1, embedding=400)).layer == 0
    assert first_outlier_layer("emergence", table(top1, embedding=500)).layer is None
    high = table([5.0] * 6, embedding=5000)
    for rule in RATIOS:
        assert first_outlier_layer(rule, high).layer is None


@pytest.mark.parametrize("embedding", [None, 1.0])
def test_single_layer(embedding: float | None) -> None:
    layers = table([5000], embedding=embedding)
    assert first_outlier_layer("emergence", layers).layer is None
    assert first_outlier_layer("emergence", layers, persist=0).layer == 0
    assert first_outlier_layer("massive", layers).layer == 0
    assert first_outlier_layer("systematic", layers).layer == 0


@pytest.mark.parametrize("rule", RATIOS)
@pytest.mark.parametrize("broken", [1, 2, 5])
def test_layers_of_nan_are_passed_over(rule: str, broken: int) -> None:
    top1, other = [5.0, 5, 5, 5000, 5000, 5000, 5000, 5000], [1.0] * 8
    top1[broken] = other[broken] = NAN
    unsure = rule == "emergence" and broken == 5  # within the layers where it has to stay
    verdict = first_outlier_layer(rule, table(top1, other, other))
    assert verdict.layer == (None if unsure else 3)


@pytest.mark.parametrize("rule", [*RATIOS, "zscore"])
@pytest.mark.parametrize("embedding", [1.0, NAN])
def test_nothing_finite_at_all(rule: str, embedding: float) -> None:
    verdict = first_outlier_layer(rule, table([NAN] * 4, NAN, NAN, embedding))
    assert verdict.layer is None
    assert "no layer has finite activations" in verdict.reason


@pytest.mark.parametrize("rule", [*RATIOS, "zscore"])
def test_magnitudes_of_zero_are_no_outliers(rule: str) -> None:
    """0 / 0 in every layer, as a scan of a model that is all zeros or all NaN gives."""
    verdict = first_outlier_layer(rule, table([0.0] * 5, 0.0, 0.0))
    assert verdict.layer is None
    assert "nan" not in verdict.reason


def test_unknown_rule_and_parameter_are_sentences() -> None:
    layers = table([5.0])
    with pytest.raises(ValueError, match="rule 'sun' is unknown: choose one of emergence, massive"):
        first_outlier_layer("sun", layers)
    with pytest.raises(ValueError, match="rule systematic has no parameter jump, persist"):
        first_outlier_layer("systematic", layers, persist=1, jump=2)


@pytest.mark.parametrize(
    ("rule", "strict", "found"),
    [
        ("emergence", {"jump": 20.0}, 1),
        ("emergence", {"ratio": 2000.0}, 1),
        ("emergence", {"persist": 6.0}, 1),
        ("massive", {"ratio": 2000.0}, 1),
        ("massive", {"magnitude": 2000.0}, 1),
        ("systematic", {"ratio": 2000.0}, 1),
    ],
)
def test_parameters_change_the_verdict(rule: str, strict: dict[str, float], found: int) -> None:
    layers = table([60, 1000, 1000, 1000, 1000], mean=0.9, embedding=20)
    assert first_outlier_layer(rule, layers).layer == found
    verdict = first_outlier_layer(rule, layers, **strict)
    assert verdict.layer is None
    assert verdict.parameters == RULES[rule].parameters | strict


@pytest.mark.parametrize("rule", RULES)
def test_definition_names_every_parameter(rule: str) -> None:
    assert all(f"`{name}`" in RULES[rule].definition for name in RULES[rule].parameters)
    assert RULES[rule].name == rule
