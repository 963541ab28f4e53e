"""Statistics against known answers, other implementations, and simulations of their error rates."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from zo_core.compare.power import least_units, smallest_p, units_needed
from zo_core.compare.stats import (
    EXACT_UP_TO,
    bootstrap_interval,
    compare,
    effect_size,
    holm,
    rank_correlation,
    sign_flip_p,
    summarise,
    wilcoxon_p,
)

DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
"""Darwin's maize, crossed minus self-fertilised, eighths of an inch: Fisher (1935) took all 2^15
sign flips and found 863 sums as large as 314 on one side."""


def test_sign_flips_of_darwins_maize_as_fisher_counted_them() -> None:
    assert sign_flip_p(DARWIN, greater=True) == pytest.approx(863 / 2**15)
    assert sign_flip_p(DARWIN) == pytest.approx(2 * 863 / 2**15)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_sign_flips_as_scipy_does_them(n: int) -> None:
    d = np.random.default_rng(n).normal(0.4, 1, n)
    for name, greater in (("two-sided", False), ("greater", True)):
        theirs = scipy_stats.permutation_test(
            (d,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative=name
        )
        assert sign_flip_p(d, greater) == pytest.approx(theirs.pvalue)


def test_many_units_are_drawn_and_seeded() -> None:
    d = np.random.default_rng(0).normal(0.2, 1, EXACT_UP_TO + 14)
    assert sign_flip_p(d) == sign_flip_p(d)
    assert sign_flip_p(d) == pytest.approx(scipy_stats.ttest_1samp(d, 0).pvalue, abs=0.02)
    assert sign_flip_p(d + 100) > 0, "a drawn p is never 0"


def test_smallest_p_is_what_equal_signs_give() -> None:
    for n in range(1, 8):
        d = np.arange(1, n + 1)
        assert sign_flip_p(d) == pytest.approx(smallest_p(n))
        assert sign_flip_p(d, greater=True) == pytest.approx(smallest_p(n, greater=True))
    assert (least_units(0.05), least_units(0.05, greater=False)) == (5, 6)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04, None, 0.01]) == [0.04, None, 0.02]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_summary_leaves_missing_values_out() -> None:
    found = summarise([1.0, None, 3.0, math.nan])
    assert (found.n, found.mean, found.sd) == (2, 2.0, pytest.approx(math.sqrt(2)))
    assert (summarise([]).n, summarise([]).mean, summarise([5.0]).sd) == (0, None, None)


def test_effect_size_and_wilcoxon() -> None:
    assert effect_size([1, 2, 3]) == pytest.approx(2.0)
    assert effect_size([1, 1, 1]) is None
    d = [0.3, -0.1, 0.4, 0.7, 0.9, 0.2, 1.1]
    assert wilcoxon_p(d) == pytest.approx(2 * 2 / 2**7), "only the smallest rank is negative"
    assert wilcoxon_p(d[:5]) is None, "too few to reach 0.05"


def test_rank_correlation() -> None:
    rho, p = rank_correlation([1, 2, 3, 4, None], [10, 20, 40, 30, 7]) or (0.0, 0.0)
    assert rho == pytest.approx(0.8)
    assert p == pytest.approx(8 / 24), "of all orders of four"
    x = np.random.default_rng(1).normal(size=16)
    assert rank_correlation(list(x), list(np.exp(x))) == pytest.approx((1.0, 0.0))
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None
    assert rank_correlation([], []) is None


@pytest.mark.parametrize(
    ("values", "baseline", "reason"),
    [
        ([0.8], [0.7], "one pair only"),
        ([0.8, 0.8, 0.8], [0.8, 0.8, 0.8], "all pairs are equal"),
        ([0.75, 0.75, 0.75], [0.5, 0.5, 0.5], "all differences are equal"),
        ([None, math.nan, 0.8], [0.7, 0.7, None], "no pair"),
        ([], [], "no pair"),
    ],
)
def test_degenerate_pairs_say_why(
    values: list[float | None], baseline: list[float | None], reason: str
) -> None:
    found = compare(values, baseline)
    assert reason in found.reason
    assert found.p is None
    assert found.low is None


def test_pairs_of_a_known_difference() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 10, 12)
    found = compare(list(hard + rng.normal(1, 0.3, 12)), list(hard))
    assert (found.n, found.reason) == (12, "")
    assert found.mean == pytest.approx(1, abs=0.3)
    assert found.low is not None
    assert found.high is not None
    assert 0.7 < found.low < found.mean < found.high < 1.3, "pairing removes what seeds share"
    assert found.p == found.smallest_p == pytest.approx(2 / 2**12)


def test_bootstrap_is_seeded_and_covers() -> None:
    """Of 1000 intervals of 20 normal values 92.9 % hold the mean, give or take 3 standard errors.

    The percentile interval is about mean +/- 1.96 sqrt(19/20) s / sqrt(20): P(|t_19| < 1.91).
    """
    assert bootstrap_interval([1, 2, 3]) == bootstrap_interval([1, 2, 3])
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        low, high = bootstrap_interval(rng.normal(0, 1, 20)) or (0.0, 0.0)
        hits += low <= 0 <= high
    assert hits / 1000 == pytest.approx(0.929, abs=0.025)


@pytest.mark.parametrize("n", [5, 8, 12])
def test_sign_flips_keep_their_level(n: int) -> None:
    """2000 data sets without an effect: p <= 0.05 in at most 5 % (+ 3 standard errors: 1.5 %)."""
    rng = np.random.default_rng(n)
    spread = rng.uniform(0.2, 5, n)  # units may differ in spread
    false = sum(sign_flip_p(rng.normal(0, spread), greater=True) <= 0.05 for _ in range(2000))
    assert false / 2000 <= 0.065


def test_needed_units_give_the_power() -> None:
    """As many units as asked for find the effect in 80 % of 500 data sets, give or take 8 %."""
    n = units_needed(0.9, 0.05)
    assert n == 9
    rng = np.random.default_rng(0)
    hits = sum(sign_flip_p(rng.normal(0.9, 1, n), greater=True) <= 0.05 for _ in range(500))
    assert 0.72 <= hits / 500 <= 0.9
    assert units_needed(-0.5, 0.05) is None
    assert units_needed(None, 0.05) is None
    assert units_needed(50, 0.05) == 5, "sign flips cannot reach 0.05 with fewer"
