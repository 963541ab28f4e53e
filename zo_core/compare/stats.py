"""Statistics of paired comparisons: few seeds, no assumption of normality where it can be avoided.

A unit is one (task, seed): arms share the seed's batches and, where they tune the same weights,
its z, so their difference is paired. All functions take plain sequences, leave NaN and None out,
and say *why* where the data cannot tell (``reason``), instead of a number that looks like one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from zo_core.compare.power import smallest_p

EXACT_UP_TO = 16
"""Units up to which all 2^n sign flips are taken; above, a seeded draw of them."""
FLIPS = 20_000
RESAMPLES = 10_000
LEAST_FOR_WILCOXON = 6
"""Below, its smallest two-sided p is above 0.05: it could only ever say no."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and spread of one arm."""

    n: int
    mean: float | None
    sd: float | None
    """Sample standard deviation; None below two values."""


@dataclass(frozen=True, slots=True)
class Paired:
    """An arm against a baseline, over the units that both have."""

    n: int
    mean: float | None
    low: float | None
    """Percentile bootstrap interval of the mean difference."""
    high: float | None
    p: float | None
    """Two-sided, exact sign flips."""
    p_wilcoxon: float | None
    effect: float | None
    """Cohen's d_z: mean over standard deviation of the differences."""
    smallest_p: float | None
    """The smallest two-sided p that n units can give."""
    reason: str = ""
    """Why this says nothing; empty if it does."""


def clean(values: Sequence[float | None]) -> Floats:
    """The finite ones among values, as an array."""
    kept = [v for v in values if v is not None and math.isfinite(v)]
    return np.asarray(kept, dtype=np.float64)


def summarise(values: Sequence[float | None]) -> Summary:
    """Mean, sample standard deviation and number of the values that are there."""
    x = clean(values)
    mean = float(x.mean()) if len(x) else None
    return Summary(len(x), mean, float(x.std(ddof=1)) if len(x) > 1 else None)


@lru_cache(maxsize=32)
def _signs(n: int) -> Floats:
    """All sign patterns of n units, or a seeded draw with the identity first; a row each."""
    if n <= EXACT_UP_TO:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return np.where(bits == 1, -1.0, 1.0)
    drawn = np.random.default_rng(0).integers(0, 2, size=(FLIPS, n))
    drawn[0] = 0  # the data themselves: keeps the test valid (Phipson and Smyth 2010)
    return np.where(drawn == 1, -1.0, 1.0)


def sign_flip_p(differences: Sequence[float] | Floats, greater: bool = False) -> float:
    """The p value of a mean difference under random signs (Fisher's randomisation test).

    Valid if differences are symmetric around 0 under the null hypothesis, whatever their spread.

    Args:
        differences: one a unit.
        greater: one-sided, against a mean above 0; else two-sided.
    """
    d = np.asarray(differences, dtype=np.float64)
    if not len(d):
        return 1.0
    means = _signs(len(d)) @ d
    seen, tolerance = d.sum(), 1e-12 * np.abs(d).sum()
    if greater:
        return float(np.mean(means >= seen - tolerance))
    return float(np.mean(np.abs(means) >= abs(seen) - tolerance))


def wilcoxon_p(differences: Sequence[float] | Floats) -> float | None:
    """Two-sided Wilcoxon signed-rank p, zeros split (Pratt); None where n is too small for it."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < LEAST_FOR_WILCOXON or not np.any(d):
        return None
    tied = len(np.unique(np.abs(d))) < len(d) or not np.all(d)
    method = "exact" if len(d) <= 50 and not tied else "asymptotic"
    return float(scipy_stats.wilcoxon(d, zero_method="pratt", method=method).pvalue)


def bootstrap_interval(
    differences: Sequence[float] | Floats, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean (Efron 1979), seeded; None below two values.

    With five units or fewer it is too narrow: the tests decide, the interval only shows.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, len(d), size=(RESAMPLES, len(d)))
    low, high = np.quantile(d[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def effect_size(differences: Sequence[float] | Floats) -> float | None:
    """Cohen's d_z = mean / sd of the differences; None below two values or without spread."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2:
        return None
    sd = float(d.std(ddof=1))
    return float(d.mean()) / sd if sd > 1e-12 * (1 + float(np.abs(d).max())) else None


def why_nothing(differences: Floats) -> str:
    """Why paired differences cannot tell anything; empty if they can."""
    n = len(differences)
    if n == 0:
        return "no pair of finished runs"
    if n == 1:
        return "one pair only: give more seeds"
    if np.ptp(differences) <= 1e-12 * (1 + float(np.abs(differences).max())):
        return (
            "all differences are equal, so their spread is unknown"
            if np.any(differences)
            else "all pairs are equal"
        )
    return ""


def compare(
    values: Sequence[float | None], baseline: Sequence[float | None], seed: int = 0
) -> Paired:
    """Paired differences ``values - baseline`` with intervals and tests.

    Args:
        values: one a unit; None or NaN where the run failed.
        baseline: the same units in the same order.
        seed: of the bootstrap.
    """
    d = clean([_minus(a, b) for a, b in zip(values, baseline, strict=True)])
    reason = why_nothing(d)
    mean = float(d.mean()) if len(d) else None
    if reason:
        return Paired(len(d), mean, None, None, None, None, None, None, reason)
    interval = bootstrap_interval(d, seed=seed)
    assert interval is not None
    return Paired(
        len(d),
        mean,
        *interval,
        sign_flip_p(d),
        wilcoxon_p(d),
        effect_size(d),
        smallest_p(len(d)),
    )


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p values (1979), in the given order; None stays None."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


def rank_correlation(
    a: Sequence[float | None], b: Sequence[float | None]
) -> tuple[float, float] | None:
    """Spearman's rho and its two-sided p over the pairs that both have.

    None below four pairs, or where one side does not vary. p is exact (all orders) up to seven
    pairs, else by the t distribution.
    """
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if _minus(x, y) is not None]
    x, y = np.asarray(pairs, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rho = float(scipy_stats.spearmanr(x, y).statistic)
    if len(x) > 7:
        return rho, float(scipy_stats.spearmanr(x, y).pvalue)
    exact = scipy_stats.permutation_test(
        (x,),
        lambda order: scipy_stats.spearmanr(order, y).statistic,
        permutation_type="pairings",
        n_resamples=np.inf,
    )
    return rho, float(exact.pvalue)
