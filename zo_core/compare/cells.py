"""Cells: the runs that a comparison is made of, and the learning rate each arm goes on with.

For every task and arm with more than one learning rate, each is tried once with ``search_seed``;
the one with the lowest loss on the **dev** rows is kept, and used with every seed. Validation rows,
which results are measured on, take no part in the choice.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from zo_core.compare.outcomes import DIVERGED, FAILED, Outcome
from zo_core.compare.spec import Arm, CompareSpec
from zo_core.jobs import TuneJob


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a comparison."""

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
class Choice:
    """The learning rate of an arm on a task."""

    lr: float | None
    """None: every candidate failed."""
    dev_losses: dict[float, float | None]
    """Dev loss of every candidate; None: it failed or diverged. Empty if there was one only."""
    reason: str = ""
    """Why there is none."""

    @property
    def at_edge(self) -> bool:
        """The smallest or largest candidate won: a better one may lie outside the grid."""
        tried = sorted(self.dev_losses)
        return len(tried) > 1 and self.lr in (tried[0], tried[-1])


@dataclass(frozen=True, slots=True)
class Plan:
    """The cells that are known by now, and the choices they follow from."""

    cells: list[Cell]
    choices: dict[tuple[str, str], Choice]
    """By task and arm, once decided."""
    total: int
    """Cells there will be in all."""


def make_plan(spec: CompareSpec, outcome: Callable[[Cell], Outcome | None]) -> Plan:
    """Everything that can be run now, search before final runs.

    Args:
        spec: the comparison.
        outcome: what is known of a cell; None if it has not been run.
    """
    search: list[Cell] = []
    final: list[Cell] = []
    choices: dict[tuple[str, str], Choice] = {}
    total = 0
    for task in spec.tasks:
        for arm in spec.arms:
            if not arm.tunes:
                continue
            tries = list(search_cells(spec, task, arm))
            search += tries
            choice = _choose(spec, arm, tries, outcome)
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
    cells = list(dict.fromkeys(search + final))
    return Plan(cells, choices, total)


def search_cells(spec: CompareSpec, task: str, arm: Arm) -> Iterator[Cell]:
    """The runs that try learning rates; none if there is only one."""
    grid = spec.grid(arm)
    if len(grid) == 1:
        return
    steps = spec.job(arm, task, spec.search_seed, searching=True).steps
    for lr in grid:
        yield Cell(task, arm.name, lr, spec.search_seed, steps, searching=True)


def final_cells(spec: CompareSpec, task: str, arm: Arm, lr: float) -> Iterator[Cell]:
    """The runs that are compared: one a seed."""
    for seed in spec.seeds:
        yield Cell(task, arm.name, lr, seed, spec.job(arm, task, seed).steps)


def _choose(
    spec: CompareSpec, arm: Arm, tries: list[Cell], outcome: Callable[[Cell], Outcome | None]
) -> Choice | None:
    """The learning rate with the lowest dev loss; None while candidates are being tried."""
    if not tries:
        return Choice(spec.grid(arm)[0], {})
    found = [outcome(cell) for cell in tries]
    if not all(o is not None and o.settled for o in found):
        return None
    losses = {c.lr: o.dev_loss for c, o in zip(tries, found, strict=True) if o is not None}
    finite = {lr: loss for lr, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if finite:
        return Choice(min(finite, key=lambda lr: finite[lr]), losses)
    states = {o.state for o in found if o is not None}
    if states <= {DIVERGED}:
        reason = "every learning rate of the grid diverged: give this arm smaller ones"
    elif states & {FAILED}:
        reason = next(o.error for o in found if o is not None and o.state == FAILED)
    else:
        reason = "no run of the search has a loss on dev rows: raise dev_examples and eval_every"
    return Choice(None, losses, reason)
