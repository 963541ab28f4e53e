"""The decision rule: which of the paper's claims hold on this model, on these tasks.

Every claim is a mean paired difference d over units (task, seed), tested one-sided with exact sign
flips. With the margin m (0.01: one point of accuracy or F1):

====  =====================================  ================  =====================
      claim                                  *holds* if        *does not hold* if
====  =====================================  ================  =====================
(a)   dominant layer >= full                 d > -m            d < -m
(b)   dominant layer > random layers         d > 0             d < m
(c)   it is the best of all single layers    d_k > 0, every k  d_k < 0, some k (Holm)
(d)   full > full without that layer         d > 0             d < m
(e)   faster than full, fewer tuned weights  log ratio > 0     log ratio < 0
====  =====================================  ================  =====================

each at level alpha after Holm's correction over (a) to (d), separately for *holds* and for *does
not hold*: the chance that any false claim of the four *holds* is at most alpha. (e) is timed, not
scored, and stands alone. Everything else is *undecided*, as is a claim with a missing pair. If d
lies between 0 and m, (b) and (d) can meet both conditions: a difference that is there is *holds*.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from zo_core.compare.claims import LEAST_LAYERS, worded
from zo_core.compare.power import MANY_SEEDS, least_units, units_needed
from zo_core.compare.results import Results, parse_form
from zo_core.compare.spec import Arm
from zo_core.compare.stats import Floats, clean, effect_size, holm, sign_flip_p, why_nothing

Decision = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim with its decision and what it rests on."""

    key: str
    text: str
    decision: Decision
    sentence: str
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    run_ids: list[str] = field(default_factory=list)
    more_seeds: int | None = None
    """Of an undecided claim: about so many more would decide it, as far as can be told."""


@dataclass(slots=True)
class _Test:
    """A claim's two one-sided tests, before the correction over claims."""

    key: str
    text: str
    reason: str = ""
    """Why it cannot be tested."""
    p_holds: float | None = None
    p_fails: float | None = None
    effects: tuple[float | None, float | None] = (None, None)
    """d_z towards *holds* and towards *does not hold*."""
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    found: str = ""
    run_ids: list[str] = field(default_factory=list)


def verdict(results: Results) -> list[Claim]:
    """Decide the claims that the arms of a comparison speak about.

    A claim whose arms are not part of the comparison is left out.
    """
    roles = _Roles(results)
    accuracy = [make(results, roles) for make in (_full, _random, _best, _without)]
    tests = [test for test in accuracy if test is not None]
    claims = _decide(results, tests, results.spec.alpha)
    cost = _cost(results, roles)
    if cost is not None:
        claims += _decide(results, [cost], results.spec.alpha)
    return claims


class _Roles:
    """Which arm plays which part: those with the optimizer and settings of the dominant arm."""

    def __init__(self, results: Results) -> None:
        self.layer = results.dominant
        arms = [arm for arm in results.spec.arms if arm.tunes]
        names = ("layer:auto", f"layer:{self.layer}")
        wanted = [arm for name in names for arm in arms if arm.scope == name]
        plain = (a for a in wanted if not a.settings and a.optimizer == "zo-sgd")
        self.dominant = next(plain, None) or next(iter(wanted), None)
        like = [arm for arm in arms if self._alike(arm)]
        self.full = next((a for a in like if a.scope == "full"), None)
        without = ("all-but:auto", f"all-but:{self.layer}")
        self.without = next((a for a in like if a.scope in without), None)
        self.others = [a for a in like if parse_form(a) == "layer" and a.scope not in names]
        self.random = [a for a in like if parse_form(a) == "random-layer"]

    def _alike(self, arm: Arm) -> bool:
        first = self.dominant
        like = ("zo-sgd", {}) if first is None else (first.optimizer, first.settings)
        return (arm.optimizer, arm.settings) == like


# -- the claims -------------------------------------------------------------------------------


def _full(results: Results, roles: _Roles) -> _Test | None:
    text = worded("a")
    if roles.full is None or roles.dominant is None:
        return None
    return _difference(
        results, "a", text, roles.dominant, [roles.full], -results.spec.margin, lambda m: -m
    )


def _random(results: Results, roles: _Roles) -> _Test | None:
    text = worded("b")
    controls = roles.random + roles.others
    if not controls or roles.dominant is None:
        return None
    return _difference(results, "b", text, roles.dominant, controls, 0.0, lambda m: m)


def _without(results: Results, roles: _Roles) -> _Test | None:
    text = worded("d")
    if roles.without is None or roles.full is None:
        return None
    return _difference(results, "d", text, roles.full, [roles.without], 0.0, lambda m: m)


def _difference(
    results: Results,
    key: str,
    text: str,
    arm: Arm,
    controls: Sequence[Arm],
    holds_above: float,
    fails_below: Callable[[float], float],
) -> _Test:
    """``arm`` minus the mean of ``controls``."""
    names = [c.name for c in controls]
    test = _Test(key, text, run_ids=results.run_ids(arm.name, *names))
    d, test.reason = _differences(results.values(arm.name), [results.values(n) for n in names])
    if len(d):
        test.numbers = {"difference": float(d.mean()), "n": len(d)}
        shown = names[0] if len(names) == 1 else f"the mean of {len(names)} controls"
        test.found = f"{arm.name} minus {shown}: {100 * d.mean():+.2f} points"
    if not test.reason:
        _test(test, d, holds_above, fails_below(results.spec.margin))
    return test


def _test(test: _Test, d: Floats, holds_above: float, fails_below: float) -> None:
    towards, away = d - holds_above, fails_below - d
    test.p_holds = sign_flip_p(towards, greater=True)
    test.p_fails = sign_flip_p(away, greater=True)
    test.effects = (effect_size(towards), effect_size(away))
    test.numbers |= {"d_z": effect_size(d), "p_holds": test.p_holds, "p_fails": test.p_fails}


def _best(results: Results, roles: _Roles) -> _Test | None:
    """All one-sided tests must reject (intersection-union): no correction over layers is needed.

    That some layer is better is a union: corrected by Holm over layers.
    """
    text = worded("c")
    if roles.dominant is None or len(roles.others) < LEAST_LAYERS:
        return None
    names = [arm.name for arm in roles.others]
    test = _Test("c", text, run_ids=results.run_ids(roles.dominant.name, *names))
    mine = results.values(roles.dominant.name)
    rows = [_differences(mine, [results.values(name)]) for name in names]
    means = {n: float(d.mean()) for n, (d, _) in zip(names, rows, strict=True) if len(d)}
    if means:
        rival = min(means, key=lambda n: means[n])
        rank = 1 + sum(mean < 0 for mean in means.values())
        test.numbers = {"rank": rank, "layers": len(means) + 1, "difference": means[rival]}
        test.numbers["n"] = len(rows[0][0])
        test.found = (
            f"layer {roles.layer} is number {rank} of {len(means) + 1}, "
            f"{100 * means[rival]:+.2f} points from the best other ({rival})"
        )
    test.reason = next((reason for _, reason in rows if reason), "")
    if test.reason:
        return test
    above = [sign_flip_p(d, greater=True) for d, _ in rows]
    below = [sign_flip_p(-d, greater=True) for d, _ in rows]
    test.p_holds = max(above)
    test.p_fails = min(p for p in holm(below) if p is not None)
    closest = rows[above.index(max(above))][0]
    worst = rows[below.index(min(below))][0]
    test.effects = (effect_size(closest), effect_size(-worst))
    test.numbers |= {"p_holds": test.p_holds, "p_fails": test.p_fails}
    return test


def _cost(results: Results, roles: _Roles) -> _Test | None:
    text = worded("e")
    if roles.full is None or roles.dominant is None:
        return None
    mine, full = results.of(roles.dominant.name), results.of(roles.full.name)
    test = _Test("e", text, run_ids=results.run_ids(roles.dominant.name, roles.full.name))
    d, test.reason = _differences(
        [_log(m.steps_per_second) for m in mine], [[_log(m.steps_per_second) for m in full]]
    )
    weights = [
        a.tuned_parameters / b.tuned_parameters
        for a, b in zip(mine, full, strict=True)
        if a.tuned_parameters and b.tuned_parameters
    ]
    if len(d) and weights:
        faster, share = math.exp(float(d.mean())), sum(weights) / len(weights)
        test.numbers = {"speed_ratio": faster, "tuned_share": share, "n": len(d)}
        test.found = (
            f"{faster:.2f} x the steps per second, {100 * share:.1f} % of the tuned weights "
            "(cells that share a device disturb each other's time)"
        )
        if not test.reason:
            _test(test, d, 0.0, 0.0)
            if share >= 1:
                test.p_holds = 1.0
    return test


def _log(value: float | None) -> float | None:
    return math.log(value) if value else None


def _differences(
    values: Sequence[float | None], controls: Sequence[Sequence[float | None]]
) -> tuple[Floats, str]:
    """Value minus mean of the controls, for complete units; why they say nothing, or ``""``."""
    rows: list[float | None] = []
    for value, *others in zip(values, *controls, strict=True):
        whole = value is not None and all(o is not None for o in others)
        rows.append(value - sum(others) / len(others) if whole else None)  # type: ignore[operator, arg-type]
    d = clean(rows)
    missing = len(rows) - len(d)
    if missing:
        return d, f"{missing} of {len(rows)} pairs have a run that is not finished or failed"
    return d, why_nothing(d)


# -- the decision -----------------------------------------------------------------------------


def _decide(results: Results, tests: list[_Test], alpha: float) -> list[Claim]:
    """Correct over the claims and put each into words."""
    holds, fails = holm([t.p_holds for t in tests]), holm([t.p_fails for t in tests])
    claims = []
    for test, p_holds, p_fails in zip(tests, holds, fails, strict=True):
        more = None
        if test.reason:
            decision: Decision = "undecided"
            why = test.reason
        elif p_holds is not None and p_holds <= alpha:
            decision, why = "holds", f"corrected p {p_holds:.3g}"
        elif p_fails is not None and p_fails <= alpha:
            decision, why = "does not hold", f"corrected p {p_fails:.3g}"
        else:
            decision = "undecided"
            more = _more_seeds(results, test, alpha / len(tests))
            why = _needs(more)
        parts = [test.found, why] if test.found else [why]
        numbers = test.numbers | {"p_holds_holm": p_holds, "p_fails_holm": p_fails}
        claims.append(
            Claim(
                test.key,
                test.text,
                decision,
                f"{decision}: {'; '.join(parts)}",
                numbers,
                test.run_ids,
                more,
            )
        )
    return claims


def _more_seeds(results: Results, test: _Test, alpha: float) -> int | None:
    """Seeds to add until one of the two tests would come out, at the effect seen so far."""
    have, tasks = len(results.units), len(results.spec.tasks)
    needed = [n for e in test.effects if (n := units_needed(e, alpha)) is not None]
    units = min(needed, default=None)
    if units is None:
        return None
    return max(1, math.ceil((max(units, least_units(alpha)) - have) / tasks))


def _needs(more: int | None) -> str:
    if more is None:
        return "no effect either way so far: more seeds may not decide it"
    if more > MANY_SEEDS:
        return f"the effect is too small: needs more than {MANY_SEEDS} more seeds"
    return f"needs about {more} more seed{'' if more == 1 else 's'}"
