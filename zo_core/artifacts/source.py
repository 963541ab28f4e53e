"""Which weights of a run are exported, whether the form fits them, and the facts beside them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zo_core import runs
from zo_core.artifacts.raw import Stored, read_header
from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.run_jobs import Form, Weights
from zo_core.runs import Run
from zo_core.scope_spec import parse

LAST, BEST = "checkpoint.safetensors", "best.safetensors"
STATE = "optimizer/"
"""What the names of an optimizer's tensors begin with: they are no weights."""
FORMS: tuple[Form, ...] = ("tensors", "model", "adapter", "ledger")
NAMES: dict[str, str] = {
    "tensors": ".safetensors",
    "model": "-model",
    "adapter": "-adapter",
    "ledger": ".ledger.jsonl.gz",
}
"""What follows the run's id in the name of an export that was given none."""
PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Source:
    """Weights of a run that has ended."""

    run: Run
    job: TuneJob
    state: str
    details: dict[str, Any]
    path: Path
    """The safetensors file that holds them."""
    weights: str
    """``best`` (of the dev rows) or ``last``."""
    step: int
    tensors: dict[str, Stored]
    """The tuned tensors, without the optimizer's."""

    @property
    def scope(self) -> str:
        """The scope with ``auto`` replaced."""
        return str(self.details.get("scope", self.job.scope))

    @property
    def says(self) -> str:
        """Which weights these are, in words."""
        ended = "" if self.state == "done" else f", {self.state}"
        best = ", best on the dev rows" if self.weights == "best" else ""
        return f"step {self.step} of {self.job.steps}{best}{ended}"


def forms_of(job: TuneJob) -> dict[Form, str]:
    """Every form, and why a job's weights do not have it; empty if they do."""
    form = parse(job.scope).form
    return {
        "tensors": "",
        "model": "a prefix is not part of a model's weights" if form == "prefix" else "",
        "adapter": "" if form == "lora" else "only scopes lora and lora:<k> tune an adapter",
        "ledger": "the gradients of adamw are no scalars" if job.optimizer == "adamw" else "",
    }


def find_source(run_id: str, weights: Weights = "kept", form: Form = "tensors") -> Source:
    """The weights that an export of a run is about.

    Raises:
        UserError: no such run, it is still going on or damaged, it has no checkpoint, or the form
            does not fit its scope.
    """
    try:
        run = runs.get(run_id)
    except runs.RunNotFoundError as error:
        raise UserError(str(error)) from error
    try:
        job, status, summary = run.job, run.status(), run.result_json() or {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"run: the folder of {run_id} is damaged: choose another run.") from error
    assert isinstance(job, TuneJob)
    reasons = forms_of(job)
    if reasons[form]:
        fitting = ", ".join(name for name in FORMS if not reasons[name])
        raise UserError(
            f"form: {form} does not fit scope {job.scope} with optimizer {job.optimizer}: "
            f"{reasons[form]}. Choose one of: {fitting}."
        )
    if status.live:
        raise UserError(f"run: {run_id} is still going on: wait for its end, or cancel it.")
    wanted = summary.get("kept", "last") if weights == "kept" else weights
    best = wanted == "best" and (run.path / BEST).is_file()
    path = run.path / (BEST if best else LAST)
    try:
        with path.open("rb") as stream:
            metadata, tensors = read_header(stream)
        step = int(metadata.get("step") or summary["best_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"run: {run_id} has no checkpoint that can be read: go on with it "
            f"(tune --resume {run_id}); it writes one every {job.checkpoint_every} steps."
        ) from error
    return Source(
        run=run,
        job=job,
        state=status.state,
        details=status.details,
        path=path,
        weights="best" if best else "last",
        step=step,
        tensors={n: t for n, t in tensors.items() if not n.startswith(STATE)},
    )


def base_of(job: TuneJob, details: Mapping[str, Any]) -> dict[str, Any]:
    """The base model of a run, and what it was when the run began: None where it is not known.

    ``fingerprint`` is :func:`zo_core.zo.fingerprint.base_weights`; ``dominant_layer`` is what the
    rule named, if the scope asked it.
    """
    known = details.get("fingerprint", {})
    return {
        "model": job.model,
        "revision": job.revision,
        "dtype": known.get("dtype"),
        "device": known.get("kind of device"),
        "fingerprint": known.get("base weights"),
        "dominant_layer": details.get("dominant_layer"),
    }


def facts(source: Source, form: Form) -> dict[str, Any]:
    """What every export says of itself: run, job, base, scope, step, versions."""
    job, details = source.job, source.details
    entries = sum(t.values for t in source.tensors.values())
    tuned = details.get("tuned_parameters", entries)
    return {
        "format": f"zoscope-{form}",
        "version": 1,
        "run_id": source.run.run_id,
        "state": source.state,
        "job": job.model_dump(mode="json"),
        "base": base_of(job, details),
        "scope": source.scope,
        "layer": details.get("layer"),
        "weights": source.weights,
        "step": source.step,
        "steps": job.steps,
        "tuned_parameters": tuned,
        "tuned_share": tuned / entries if entries else None,
        "tensors": {
            n: {"dtype": t.dtype, "shape": list(t.shape)} for n, t in source.tensors.items()
        },
        "packages": installed(),
        "written": written(),
    }


def installed() -> dict[str, str]:
    """Versions of the packages that matter to who reads an export."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def written() -> str:
    """The time of an export, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
