"""The measurements of a comparison, unit by unit, read from its runs."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from zo_core import runs
from zo_core.compare.cells import Cell, Choice, final_cells, make_plan
from zo_core.compare.outcomes import DONE, MISSING, Outcome, read_outcome
from zo_core.compare.spec import ZERO_SHOT, Arm, CompareSpec
from zo_core.compare.store import Comparison
from zo_core.jobs import TuneJob
from zo_core.scope_spec import parse

WAITING = "waiting"
Unit = tuple[str, int]
"""Task and seed."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one final cell measured, or why it did not."""

    task: str
    arm: str
    seed: int
    state: str
    """``done``, ``failed``, ``diverged``, ``waiting``, or a state of the run store."""
    run_id: str = ""
    lr: float | None = None
    steps: int | None = None
    metric: str = ""
    value: float | None = None
    """The task's main metric on validation rows, after tuning."""
    loss: float | None = None
    before: float | None = None
    """The same metric before tuning."""
    resolved_scope: str = ""
    layer: int | None = None
    """The layer that the scope lies in, if it lies in one."""
    dominant: int | None = None
    """The layer that the outlier rule named, if the run asked it."""
    steps_per_second: float | None = None
    tuned_parameters: int | None = None
    forward_passes: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Results:
    """All final measurements of a comparison, in the order of tasks, arms and seeds."""

    spec: CompareSpec
    measurements: list[Measurement]
    choices: dict[tuple[str, str], Choice] = field(default_factory=dict)
    scan: str = ""
    """Run of the model's scan; empty if there is none."""
    probes: dict[str, str] = field(default_factory=dict)
    """Finished probe of each task."""
    scanned: int | None = None
    """The layer that the outlier rule names in that scan."""

    @property
    def tasks(self) -> list[str | None]:
        """Every task, and None for all of them if there are several."""
        return [*self.spec.tasks, *([None] if len(self.spec.tasks) > 1 else [])]

    @property
    def units(self) -> list[Unit]:
        """Every (task, seed)."""
        return [(task, seed) for task in self.spec.tasks for seed in self.spec.seeds]

    def of(self, arm: str, task: str | None = None) -> list[Measurement]:
        """An arm's measurements, a unit each."""
        return [m for m in self.measurements if m.arm == arm and (task is None or m.task == task)]

    def values(self, arm: str, task: str | None = None) -> list[float | None]:
        """An arm's values, a unit each; None where there is none."""
        return [m.value for m in self.of(arm, task)]

    def run_ids(self, *arms: str) -> list[str]:
        """The runs behind arms."""
        found = (m.run_id for arm in arms for m in self.of(arm) if m.run_id)
        return list(dict.fromkeys(found))

    @property
    def dominant(self) -> int | None:
        """The layer that the outlier rule named; None if runs disagree, or none named one.

        Where no run asked the rule, as with numbered layers only, the scan tells.
        """
        named = {m.dominant for m in self.measurements if m.dominant is not None}
        if not named:
            return self.scanned
        return named.pop() if len(named) == 1 else None


def collect(comparison: Comparison) -> Results:
    """Read the results as they are now."""
    spec, ids = comparison.spec, comparison.run_ids()
    known = {key: read_outcome(run_id) for key, run_id in ids.items()}
    plan = make_plan(spec, lambda cell: known.get(cell.key))
    found: list[Measurement] = []
    for task in spec.tasks:
        for arm in spec.arms:
            if not arm.tunes:
                continue
            choice = plan.choices.get((task, arm.name))
            if choice is None or choice.lr is None:
                state, reason = (WAITING, "") if choice is None else ("failed", choice.reason)
                found += (
                    Measurement(task, arm.name, seed, state, error=reason) for seed in spec.seeds
                )
                continue
            found += (
                _measurement(cell, known.get(cell.key))
                for cell in final_cells(spec, task, arm, choice.lr)
            )
    shots = [arm for arm in spec.arms if not arm.tunes]
    found += [m for arm in shots for m in _zero_shot(spec, arm, found)]
    order = {arm.name: i for i, arm in enumerate(spec.arms)}
    found.sort(key=lambda m: (spec.tasks.index(m.task), order[m.arm], spec.seeds.index(m.seed)))
    profiles = {
        cell: known[cell.key]
        for cell in plan.profiles
        if cell.key in known and known[cell.key].state == DONE
    }
    scan = next((o for cell, o in profiles.items() if cell.kind == "scan"), None)
    named = ((scan and scan.summary) or {}).get("first_outlier_layer", {})
    rule = spec.common.get("rule", TuneJob.model_fields["rule"].default)
    return Results(
        spec,
        found,
        plan.choices,
        scan.run_id if scan else "",
        {cell.task: o.run_id for cell, o in profiles.items() if cell.kind == "probe"},
        named.get(rule),
    )


def _measurement(cell: Cell, outcome: Outcome | None) -> Measurement:
    facts: dict[str, Any] = {"lr": cell.lr, "steps": cell.steps}
    if outcome is None or outcome.state == MISSING:
        return Measurement(cell.task, cell.arm, cell.seed, WAITING, **facts)
    facts |= {"run_id": outcome.run_id, "dominant": outcome.dominant}
    summary = outcome.summary
    if summary is None:
        return Measurement(
            cell.task, cell.arm, cell.seed, outcome.state, error=outcome.error, **facts
        )
    metric = summary["metric"]
    return Measurement(
        cell.task,
        cell.arm,
        cell.seed,
        outcome.state,
        metric=metric,
        value=outcome.value,
        loss=summary["after"].get("loss"),
        before=summary["before"].get(metric),
        resolved_scope=summary["resolved_scope"],
        layer=summary["layer"],
        steps_per_second=summary["steps_per_second"],
        tuned_parameters=summary["tuned_parameters"],
        forward_passes=summary["forward_passes"],
        **facts,
    )


def _zero_shot(spec: CompareSpec, arm: Arm, found: list[Measurement]) -> list[Measurement]:
    """The model before tuning, from runs that had it as it is.

    A prefix changes the model from the start, and an arm's own settings may.
    """
    plain = [a.name for a in spec.arms if a.tunes and not a.settings and parse_form(a) != "prefix"]
    shots = []
    for task in spec.tasks:
        for seed in spec.seeds:
            source = next(
                (
                    m
                    for m in found
                    if (m.task, m.seed) == (task, seed) and m.arm in plain and m.before is not None
                ),
                None,
            )
            shots.append(
                Measurement(task, arm.name, seed, WAITING)
                if source is None
                else Measurement(
                    task,
                    arm.name,
                    seed,
                    source.state,
                    source.run_id,
                    metric=source.metric,
                    value=source.before,
                    before=source.before,
                    resolved_scope=ZERO_SHOT,
                    forward_passes=0,
                    tuned_parameters=0,
                )
            )
    return shots


def parse_form(arm: Arm) -> str:
    """The form of an arm's scope."""
    return parse(arm.scope.replace("{seed}", "0")).form if arm.tunes else ZERO_SHOT


def provenance_of(results: Results) -> dict[str, Any]:
    """Versions and hardware, from the first finished run."""
    for m in results.measurements:
        if m.state == DONE:
            with suppress(runs.RunNotFoundError):  # deleted since
                facts = runs.get(m.run_id).result_json("provenance.json")
                if facts:
                    return facts
    return {}
