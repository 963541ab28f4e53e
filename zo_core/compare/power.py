"""What so many units can tell: the smallest p there is, and how many units an effect needs.

Without scipy, so that a form can say it before anything is started.
"""

import math
from statistics import NormalDist

POWER = 0.8
MANY_SEEDS = 1000


def smallest_p(n: int, greater: bool = False) -> float:
    """The smallest p that sign flips of n units can give: 2^-n, twice that if two-sided."""
    return min(1.0, (1 if greater else 2) * 2.0**-n)


def least_units(alpha: float, greater: bool = True) -> int:
    """The fewest units whose smallest p is at most alpha."""
    return math.ceil(math.log2((1 if greater else 2) / alpha))


def units_needed(effect: float | None, alpha: float, greater: bool = True) -> int | None:
    """Units for a test of the mean to come out at the observed effect with power 0.8.

    Normal approximation with the usual small-sample term (Guenther 1981):
    ``n = ((z_alpha + z_power) / d_z)^2 + z_alpha^2 / 2``, and never fewer than the sign flips need
    to reach alpha at all.

    Args:
        effect: d_z, with the sign of the hypothesis; None if unknown.
        alpha: level of the test.
        greater: one-sided.

    Returns:
        None if the effect is unknown or points the other way.
    """
    if effect is None or effect <= 0:
        return None
    z_alpha = NormalDist().inv_cdf(1 - (alpha if greater else alpha / 2))
    z_power = NormalDist().inv_cdf(POWER)
    n = ((z_alpha + z_power) / effect) ** 2 + z_alpha**2 / 2
    return max(math.ceil(n), least_units(alpha, greater))


def power_note(units: int, claims: int, alpha: float) -> str:
    """What the number of units means for a verdict on so many claims.

    The first of them has to be significant at ``alpha / claims`` (Holm).
    """
    needed = least_units(alpha / claims)
    each = f"{units} unit{'' if units == 1 else 's'} (task x seed)"
    smallest = smallest_p(units, greater=True)
    if units < needed:
        return (
            f"{each}: no claim on the metric can be decided, as the smallest p is {smallest:.3g} "
            f"and {claims} of them at {alpha:g} need {alpha / claims:.3g}: {needed} units or more."
        )
    return (
        f"{each}: the smallest p is {smallest:.3g}, enough to decide {claims} claims on the metric "
        f"at {alpha:g} ({needed} units are the fewest that can). A small effect needs many more."
    )
