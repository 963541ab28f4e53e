"""The runs as pages list them: spec, status and summary of each, read once after it has ended."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages.parts.choice import Choice
from pages.parts.words import clock, shorten
from zo_core import runs
from zo_core.compare import store
from zo_core.jobs import Job
from zo_core.tasks.catalog import METRIC_NAMES, main_metric

KINDS = ("scan", "mechanism", "probe", "tune")
READS_TEXT = ("scan", "mechanism")
ALL_KINDS = (*KINDS, "preview", "export", "load", "unload")


@dataclass(frozen=True, slots=True)
class Entry:
    """One run in a list."""

    run: runs.Run
    job: Job
    status: runs.Status
    summary: dict[str, Any]

    @property
    def run_id(self) -> str:
        """The id of the run."""
        return self.run.run_id

    @property
    def title(self) -> str:
        """What tells this run from others of its kind: model, task or text, scope."""
        job = self.job
        parts = [shorten(getattr(job, "model", ""), 28)]
        if job.kind in READS_TEXT:
            parts.append({"sample": "bundled text", "prompt": "own prompt"}.get(job.text, job.task))
        elif job.kind == "probe":
            parts += [job.task, f"{job.draws} draws"]
        elif job.kind == "tune":
            parts += [job.task, self.scope, f"{job.steps:,} steps", f"seed {job.seed}"]
        return " · ".join(part for part in parts if part)

    @property
    def scope(self) -> str:
        """The tuned scope, with the layer that auto or a draw named once it is known."""
        scope = getattr(self.job, "scope", "")
        details = self.status.details
        layer = details.get("layer")
        if scope.startswith("random-layer") and layer is not None:
            return f"{scope} (layer {layer})"
        resolved = details.get("scope", scope)
        return f"{resolved} (auto)" if resolved != scope else scope

    @property
    def short(self) -> str:
        """Kind and state with what tells jobs apart, for a narrow list: the rest may be cut."""
        job, status = self.job, self.status
        state = status.state
        if state == "running" and status.total:
            state = f"{100 * status.step / status.total:.0f} %"
        what, more = shorten(getattr(job, "model", ""), 16), ""
        if job.kind == "tune":
            what, more = self.scope.removesuffix(" (auto)"), f"{job.steps:,} steps"
        elif job.kind == "probe":
            what = f"{len(job.layers)} layers" if job.layers else "all layers"
            more = f"{job.draws} draws"
        elif job.kind in READS_TEXT:
            what = {"sample": "bundled text", "prompt": "own prompt"}.get(job.text, job.task)
        return " · ".join(filter(None, (f"{job.kind.capitalize()} {what}".strip(), state, more)))

    @property
    def label(self) -> str:
        """One line for a list of runs."""
        return f"{clock(self.status.created)} · {self.title} · {self.status.state}"

    @property
    def key_result(self) -> str:
        """What the run found, in a few words."""
        if self.status.state == "failed":
            return self.status.error
        summary = self.summary
        if self.job.kind == "scan" and "first_outlier_layer" in summary:
            layer = summary["first_outlier_layer"].get("emergence")
            return "no first outlier layer" if layer is None else f"first outlier layer {layer}"
        writer = summary.get("writer")
        if self.job.kind == "mechanism" and writer:
            part = {"mlp": "MLP", "attention": "attention"}[writer["part"]]
            return f"written by the {part} of layer {writer['layer']}"
        if self.job.kind == "probe" and summary.get("most_sensitive_layer") is not None:
            return f"largest mean |g| at layer {summary['most_sensitive_layer']}"
        before, after = (percent(summary.get(key), self.metric) for key in ("before", "after"))
        if before and after:
            return f"{METRIC_NAMES[self.metric]} {before} → {after}"
        return ""

    @property
    def metric(self) -> str:
        """The main metric of the run's task."""
        return main_metric(getattr(self.job, "task", ""))


def percent(evaluation: dict[str, Any] | None, metric: str) -> str:
    """A metric of an evaluation as a percentage, empty if there is none."""
    value = (evaluation or {}).get(metric)
    return "" if value is None else f"{100 * value:.1f} %"


_ended: dict[str, tuple[int, Entry]] = {}


def read(run: runs.Run) -> Entry | None:
    """The entry of a run; None if its folder is damaged or being deleted."""
    try:
        changed = (run.path / "status.json").stat().st_mtime_ns
        known = _ended.get(str(run.path))
        if known and known[0] == changed:
            return known[1]
        entry = Entry(run, run.job, run.status(), run.result_json() or {})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    # "interrupted" is found by looking at the process, not at the file: look again next time.
    if entry.status.state in ("done", "failed", "cancelled"):
        _ended[str(run.path)] = (changed, entry)
    return entry


def entries(kinds: tuple[str, ...] = KINDS) -> list[Entry]:
    """All readable runs of the given kinds, newest first."""
    found = [entry for run in runs.list_runs(kinds) if (entry := read(run))]
    # Ids order runs by the second only.
    return sorted(found, key=lambda entry: entry.status.created, reverse=True)


_cells: dict[Path, tuple[int, frozenset[str]]] = {}


def comparison_of() -> dict[str, str]:
    """The comparison that each run is a cell of, by run id; lists of cells are read when they grow.

    A comparison has up to hundreds of runs, which its own page shows: they are not what a person
    looks for in a list of what was started by hand.
    """
    found = {}
    for comparison in store.list_comparisons():
        try:
            size = (comparison.path / "cells.jsonl").stat().st_size
        except OSError:
            continue
        known = _cells.get(comparison.path)
        if known is None or known[0] != size:
            known = _cells[comparison.path] = size, comparison.every_run()
        found.update(dict.fromkeys(known[1], comparison.comparison_id))
    return found


def by_hand(listed: Iterable[Entry]) -> list[Entry]:
    """The runs that are no cells of a comparison."""
    cells = comparison_of()
    return [entry for entry in listed if entry.run_id not in cells]


def of_kind(kind: str) -> list[Entry]:
    """The runs that a page of a kind offers, newest first.

    All tuning runs but cells: the few scans and probes of a comparison are as good as others.
    """
    found = entries((kind,))
    return by_hand(found) if kind == "tune" else found


def live() -> list[Entry]:
    """Running, then queued jobs of every kind, oldest first."""
    found = [entry for entry in reversed(entries(ALL_KINDS)) if entry.status.live]
    return sorted(found, key=lambda entry: entry.status.state == "queued")


def labels(listed: Iterable[Entry]) -> dict[str, str]:
    """A label for each run id; where two would be the same, the end of the id tells them apart.

    A list box gives back the label that was chosen, so equal labels would be one run.
    """
    found = {entry.run_id: entry.label for entry in listed}
    seen = Counter(found.values())
    return {
        run_id: f"{label} · {run_id[-6:]}" if seen[label] > 1 else label
        for run_id, label in found.items()
    }


def ahead(entry: Entry) -> int:
    """How many live jobs come before a queued one."""
    return sum(
        other.status.state == "running" or other.status.created < entry.status.created
        for other in live()
        if other.run_id != entry.run_id
    )


def preferred(kind: str, choice: Choice) -> Entry | None:
    """The run of a model to show first: the newest that is live, done or got somewhere.

    Failed runs, and those that ended before their first step, come last.
    """
    of_choice = [
        e for e in of_kind(kind) if (e.job.model, e.job.revision) == (choice.model, choice.revision)
    ]
    useful = (
        e
        for e in of_choice
        if e.status.live
        or e.status.state == "done"
        or (e.status.state != "failed" and e.status.step > 0)
    )
    return next(useful, of_choice[0] if of_choice else None)


def of_model(kind: str, choice: Choice, done: bool = False) -> Entry | None:
    """The newest run of a kind on the chosen model; with ``done``, the newest that finished."""
    for entry in entries((kind,)):
        if (entry.job.model, entry.job.revision) == (choice.model, choice.revision) and (
            not done or entry.status.state == "done"
        ):
            return entry
    return None


def outlier_layer(choice: Choice, rule: str = "emergence") -> tuple[int | None, Entry | None]:
    """The first outlier layer that the newest finished scan of a model names, and that scan."""
    scan = of_model("scan", choice, done=True)
    found = scan.summary.get("first_outlier_layer", {}).get(rule) if scan else None
    return found, scan
