"""Does arithmetic in place, as published code does it, change the picture?

An arm with precision ``inplace`` is held against the arm that is the same but for precision and
dtype, and the lead of the dominant layer over the full model in place against that lead with an
fp32 master.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from zo_core.compare.reader import ALL
from zo_core.compare.results import Results
from zo_core.compare.spec import Arm
from zo_core.compare.stats import Floats, clean, compare, holm, sign_flip_p

OWN = ("precision", "dtype")
COLUMNS = ["task", "dtype", "what", "pairs", "difference", "low", "high", "p", "p_holm", "finding"]
Values = Sequence[float | None]


def precision_table(results: Results) -> pd.DataFrame:
    """A row a task and question; none without arms in place.

    ``finding``: *changes* if the two-sided p, corrected by Holm over the questions on a task, is at
    most alpha; *no change beyond the margin* if both one-sided tests against the margin come out at
    alpha (Schuirmann 1987); else *no change shown*, or why there is no test.
    """
    rows: list[dict[str, Any]] = []
    for task in results.tasks:
        asked = [
            {"task": task or ALL, "dtype": dtype, "what": what} | _answer(results, values, base)
            for dtype, what, values, base in _questions(results, task)
        ]
        corrected = holm([row["p"] for row in asked])
        for row, p in zip(asked, corrected, strict=True):
            if p is not None and p <= results.spec.alpha:
                row["finding"] = "changes"
            rows.append(row | {"p_holm": p})
    return pd.DataFrame(rows, columns=COLUMNS)


def _questions(results: Results, task: str | None) -> list[tuple[str, str, Values, Values]]:
    """Dtype, words, and the two sides of each question."""
    found: list[tuple[str, str, Values, Values]] = []
    leads: dict[str, dict[str, tuple[Values, Values]]] = {}
    for arm in results.spec.arms:
        plain = _counterpart(results, arm)
        if plain is None:
            continue
        dtype = str(arm.settings.get("dtype", "the model's dtype"))
        sides = results.values(arm.name, task), results.values(plain.name, task)
        found.append((dtype, f"{arm.name} minus {plain.name}", *sides))
        role = "full" if arm.scope == "full" else "dominant" if arm.scope == "layer:auto" else ""
        leads.setdefault(dtype, {})[role] = sides
    for dtype, roles in leads.items():
        if {"full", "dominant"} <= roles.keys():
            inplace, plain_lead = (
                [_minus(a, b) for a, b in zip(d, f, strict=True)]
                for d, f in zip(roles["dominant"], roles["full"], strict=True)
            )
            found.append((dtype, "lead of the dominant layer over full", inplace, plain_lead))
    return found


def _counterpart(results: Results, arm: Arm) -> Arm | None:
    """The arm that differs from one in place by precision and dtype only."""
    if arm.settings.get("precision") != "inplace":
        return None
    scopes = {arm.scope}
    if results.dominant is not None:
        auto, numbered = "layer:auto", f"layer:{results.dominant}"
        scopes |= {auto, numbered} if arm.scope in (auto, numbered) else set()
    rest = {name: value for name, value in arm.settings.items() if name not in OWN}
    for other in results.spec.arms:
        if other.scope in scopes and (other.optimizer, other.settings) == (arm.optimizer, rest):
            return other
    return None


def _answer(results: Results, values: Values, base: Values) -> dict[str, Any]:
    paired = compare(values, base)
    missing = len(values) - paired.n
    finding = paired.reason
    if not finding and missing:
        # In-place arithmetic that diverges is an answer: a mean over the rest would hide it.
        finding = f"{missing} of {len(values)} pairs have a run that is not finished or failed"
    elif not finding:
        d = clean([_minus(a, b) for a, b in zip(values, base, strict=True)])
        finding = "no change beyond the margin" if _within(results, d) else "no change shown"
    return {
        "pairs": paired.n,
        "difference": paired.mean,
        "low": paired.low,
        "high": paired.high,
        "p": paired.p,
        "finding": finding,
    }


def _within(results: Results, d: Floats) -> bool:
    m, alpha = results.spec.margin, results.spec.alpha
    return max(sign_flip_p(d + m, greater=True), sign_flip_p(m - d, greater=True)) <= alpha


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
