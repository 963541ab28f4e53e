"""Cells: the runs that a comparison is made of, and the learning rate each arm goes on with.

For every task and arm with more than one learning rate, each is tried once with ``search_seed``;
the one with the lowest loss on the **dev** rows is kept, and used with every seed. Validation rows,
which results are measured on, take no part in the choice. While the best rate is the smallest or
largest of its grid, the grid grows by one factor in that direction, ``lr_extensions`` times at
most.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from zo_core.compare.outcomes import DIVERGED, FAILED, Outcome
from zo_core.compare.spec import Arm, CompareSpec
from zo_core.jobs import ProbeJob, ScanJob, TuneJob

LR_RANGE = (1e-12, 1e3)
"""A grid does not grow beyond these."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One tuning run of a comparison."""

    task: str
    arm: str
    lr: float
    seed: int
    steps: int
    searching: bool = field(default=False, compare=False)
    """The run tries a learning rate. A final cell with the same job is the same cell."""

    @property
    def key(self) -> str:
        """Its name in ``cells.jsonl``: what tells one run of a comparison from all others."""
        return f"{self.task}/{self.arm}/lr={self.lr!r}/seed={self.seed}/steps={self.steps}"

    def job(self, spec: CompareSpec) -> TuneJob:
        """The tuning job that fills it."""
        return spec.job(spec.arm(self.arm), self.task, self.seed, self.lr, self.searching)


@dataclass(frozen=True, slots=True)
class ProfileCell:
    """A scan, or the probe of a task: what inference alone says of the layers."""

    kind: Literal["scan", "probe"]
    task: str = ""

    @property
    def key(self) -> str:
        """Its name in ``cells.jsonl``."""
        return f"profile/{self.kind}/{self.task}"

    def job(self, spec: CompareSpec) -> ScanJob | ProbeJob:
        """The job that fills it."""
        return spec.scan_job() if self.kind == "scan" else spec.probe_job(self.task)


@dataclass(frozen=True, slots=True)
class Choice:
    """The learning rate of an arm on a task."""

    lr: float | None
    """None: every candidate failed."""
    dev_losses: dict[float, float | None]
    """Dev loss of every candidate; None: it failed or diverged. Empty if there was one only."""
    added: int = 0
    """Candidates that were added at an edge of the grid."""
    reason: str = ""
    """Why there is no rate."""
    diverged: bool = False
    """Every candidate diverged."""

    @property
    def at_edge(self) -> bool:
        """The smallest or largest candidate won: a better one may lie outside the grid."""
        tried = sorted(self.dev_losses)
        return len(tried) > 1 and self.lr in (tried[0], tried[-1])


@dataclass(frozen=True, slots=True)
class Plan:
    """The cells that are known by now, and the choices they follow from."""

    profiles: list[ProfileCell]
    search: list[Cell]
    final: list[Cell]
    choices: dict[tuple[str, str], Choice]
    """By task and arm, once decided."""
    total: int
    """Cells there will be in all, as far as known: a grid may still grow."""

    @property
    def cells(self) -> list[Cell | ProfileCell]:
        """Everything that can be run now, each once."""
        return [*self.profiles, *dict.fromkeys(self.search + self.final)]


def make_plan(spec: CompareSpec, outcome: Callable[[Cell], Outcome | None]) -> Plan:
    """Everything that can be run now, search before final runs.

    Args:
        spec: the comparison.
        outcome: what is known of a cell; None if it has not been run.
    """
    search: list[Cell] = []
    final: list[Cell] = []
    choices: dict[tuple[str, str], Choice] = {}
    profiles = list(profile_cells(spec))
    total = len(profiles)
    for task in spec.tasks:
        for arm in spec.arms:
            if not arm.tunes:
                continue
            tries, choice = _search(spec, task, arm, outcome)
            search += tries
            total += len(tries)
            if choice is not None:
                choices[task, arm.name] = choice
            lr = 0.0 if choice is None else choice.lr
            if lr is None:
                continue  # nothing to go on with
            planned = list(final_cells(spec, task, arm, lr))
            tried = {(c.seed, c.steps) for c in tries}
            total += sum((c.seed, c.steps) not in tried for c in planned)
            if choice is not None:
                final += planned
    return Plan(profiles, search, final, choices, total)


def profile_cells(spec: CompareSpec) -> Iterator[ProfileCell]:
    """A scan of the model and a probe on every task, if the comparison asks for them."""
    if spec.wants_profiles:
        yield ProfileCell("scan")
        yield from (ProfileCell("probe", task) for task in spec.tasks)


def final_cells(spec: CompareSpec, task: str, arm: Arm, lr: float) -> Iterator[Cell]:
    """The runs that are compared: one a seed."""
    for seed in spec.seeds:
        yield Cell(task, arm.name, lr, seed, spec.job(arm, task, seed).steps)


def _search(
    spec: CompareSpec, task: str, arm: Arm, outcome: Callable[[Cell], Outcome | None]
) -> tuple[list[Cell], Choice | None]:
    """The runs that try learning rates, and the choice once they have ended."""
    rates = spec.grid(arm)
    if len(rates) == 1:
        return [], Choice(rates[0], {})
    seed = spec.search_seed
    steps = spec.job(arm, task, seed, searching=True).steps
    for added in range(spec.lr_extensions + 1):
        tries = [Cell(task, arm.name, lr, seed, steps, searching=True) for lr in rates]
        choice = _choose(tries, outcome, added)
        beyond = None if choice is None else _beyond(choice)
        if beyond is None or added == spec.lr_extensions:
            break
        rates = sorted([*rates, beyond])
    return tries, choice


def _choose(
    tries: Sequence[Cell], outcome: Callable[[Cell], Outcome | None], added: int
) -> Choice | None:
    """The learning rate with the lowest dev loss; None while candidates are being tried."""
    found = [outcome(cell) for cell in tries]
    if not all(o is not None and o.settled for o in found):
        return None
    losses = {c.lr: o.dev_loss for c, o in zip(tries, found, strict=True) if o is not None}
    finite = {lr: loss for lr, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if finite:
        return Choice(min(finite, key=lambda lr: finite[lr]), losses, added)
    states = {o.state for o in found if o is not None}
    if states <= {DIVERGED}:
        reason = "every learning rate that was tried diverged: give this arm smaller ones"
        return Choice(None, losses, added, reason, diverged=True)
    if states & {FAILED}:
        reason = next(o.error for o in found if o is not None and o.state == FAILED)
    else:
        reason = "no run of the search has a loss on dev rows: raise dev_examples and eval_every"
    return Choice(None, losses, added, reason)


def _beyond(choice: Choice) -> float | None:
    """The rate to try next: one factor beyond the edge that the best rate is at.

    Where every rate diverged it is below the smallest. None: the best one has neighbours on both
    sides, or nothing is known of any.
    """
    tried = sorted(choice.dev_losses)
    if choice.diverged:
        edge, inner = tried[0], tried[1]
    elif choice.at_edge:
        edge, inner = tried[:2] if choice.lr == tried[0] else tried[:-3:-1]
        if choice.dev_losses[edge] == choice.dev_losses[inner]:
            return None  # flat: nothing says that there is more to gain beyond
    else:
        return None
    lr = float(f"{edge**2 / inner:.6g}")
    return lr if LR_RANGE[0] <= lr <= LR_RANGE[1] and lr not in tried else None
