"""What is compared: arms x seeds x tasks at one budget, and how each arm's learning rate is found.

The fields of :class:`zo_core.jobs.TuneJob` are used under their own names: beside ``arms`` they
hold for every arm, within an arm for that arm alone. An arm's run is an ordinary tuning run.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from zo_core.compare.budget import passes_per_step
from zo_core.jobs import (
    ModelFields,
    Optimizer,
    ProbeJob,
    ScanJob,
    TuneJob,
    explain,
    recommended_lr,
)
from zo_core.scope_spec import parse

ZERO_SHOT = "zero-shot"
"""The scope of an arm that tunes nothing: measured by the ``before`` of other arms' runs."""
RULED = ("kind", "task", "seed", "steps")
"""Fields of a tuning job that the comparison itself decides."""
COMMON = frozenset(TuneJob.model_fields) - {*RULED, "scope", "optimizer", "lr"}
OWN = COMMON - {"model", "revision", "data_dir", "task_file", "template", "verbalizers"}
"""What an arm may override: all but what it is measured on."""
MANY = 10_000
LEAST_LAYERS = 4
"""Single layers from which on a profile by layer can say something."""


def _gather(value: object, into: str, names: frozenset[str]) -> object:
    """Move job fields given flat into the field that keeps them."""
    if not isinstance(value, Mapping):
        return value
    flat = {str(name): item for name, item in value.items() if name not in names}
    inner = flat.get(into) or {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"{into} must hold fields, for example {into}: {{batch_size: 4}}")
    kept = dict(inner)
    kept |= {str(name): item for name, item in value.items() if name in names}
    return flat | {into: kept}


class Arm(BaseModel):
    """One thing to compare: a scope, an optimizer and settings."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(..., pattern=r"^[\w.:%,+ -]{1,80}$", description="unique in the comparison")
    scope: str = Field(
        ...,
        max_length=200,
        description="as in tune, with {seed} for the run's seed; or zero-shot",
    )
    optimizer: Optimizer = "zo-sgd"
    lr: list[float] | None = Field(
        None, min_length=1, max_length=20, description="learning rates to choose from"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="overridden job fields")

    @model_validator(mode="before")
    @classmethod
    def _job_fields_are_flat(cls, value: object) -> object:
        return _gather(value, "settings", OWN)

    @field_validator("lr", mode="before")
    @classmethod
    def _one_lr_is_a_grid(cls, value: object) -> object:
        return [value] if isinstance(value, int | float | str) else value

    @field_validator("lr")
    @classmethod
    def _lr_is_positive(cls, value: list[float] | None) -> list[float] | None:
        if value is not None:
            if not all(0 < lr <= 1e3 for lr in value):
                raise ValueError("must hold learning rates above 0 and at most 1000")
            value = sorted(set(value))
        return value

    @field_validator("settings")
    @classmethod
    def _settings_are_job_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        _known(value, OWN)
        return value

    @field_validator("scope")
    @classmethod
    def _scope_is_known(cls, value: str) -> str:
        if value != ZERO_SHOT:
            parse(value.replace("{seed}", "0"))
        return value

    @property
    def tunes(self) -> bool:
        """False for zero-shot, which needs no run of its own."""
        return self.scope != ZERO_SHOT


class CompareSpec(BaseModel):
    """A comparison."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field("", max_length=200)
    arms: list[Arm] = Field(..., min_length=1, max_length=500)
    tasks: list[str] = Field(["reviews"], min_length=1, max_length=50)
    seeds: list[int] = Field([0, 1, 2], min_length=1, max_length=1000)
    steps: int | None = Field(
        None, ge=1, le=10_000_000, description="budget as steps of zo-sgd with the common settings"
    )
    forward_passes: int | None = Field(None, ge=1, description="budget of a run, instead of steps")
    search_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="as steps, for one learning rate; none: the same"
    )
    search_seed: int = Field(
        1000, ge=0, lt=2**31, description="seed of the learning-rate search; best not a seed above"
    )
    lr_factors: list[float] = Field(
        [0.3, 1, 3],
        min_length=1,
        max_length=20,
        description="grid around recommended_lr, for arms without lr of their own",
    )
    lr_extensions: int = Field(
        2,
        ge=0,
        le=10,
        description="rates added to a grid, one at a time, while the best is at its edge",
    )
    profiles: bool | None = Field(
        None, description="scan and probe the model as well; none: if single layers are compared"
    )
    evaluations: int = Field(
        5, ge=1, le=1000, description="evaluations a run, unless eval_every is given"
    )
    baseline: str | None = Field(None, description="arm that others are held against; none: full")
    margin: float = Field(
        0.01, gt=0, lt=1, description="what counts as no difference, in the task's metric"
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="error rate of the verdict")
    common: dict[str, Any] = Field(default_factory=dict, description="job fields of every arm")

    @model_validator(mode="before")
    @classmethod
    def _job_fields_are_flat(cls, value: object) -> object:
        return _gather(value, "common", COMMON)

    @field_validator("common")
    @classmethod
    def _common_are_job_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        _known(value, COMMON)
        return value

    @field_validator("seeds", "tasks")
    @classmethod
    def _named_once(cls, value: list[Any]) -> list[Any]:
        for item in value:
            if value.count(item) > 1:
                raise ValueError(f"name {item} twice: leave one out")
        return value

    @field_validator("lr_factors")
    @classmethod
    def _factors_are_positive(cls, value: list[float]) -> list[float]:
        if not all(0 < factor <= 1e6 for factor in value):
            raise ValueError("must be above 0, for example 0.3,1,3")
        return sorted(set(value))

    @model_validator(mode="after")
    def _is_whole(self) -> "CompareSpec":
        names = [arm.name for arm in self.arms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"arms name {twice!r} twice: give every arm its own name")
        if not any(arm.tunes for arm in self.arms):
            raise ValueError("arms tune nothing: add one, for example scope layer:auto")
        if (self.steps is None) == (self.forward_passes is None):
            raise ValueError("steps or forward_passes sets the budget: give one of the two")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is no arm: choose {', '.join(names)}")
        for arm in self.arms:
            if arm.tunes:
                self._try_jobs(arm)
        if self.wants_profiles:
            self.scan_job()
            self.probe_job(self.tasks[0])
        for arm in self.arms:
            fields = self.common | arm.settings
            for name in ("dev_examples", "eval_every"):
                if arm.tunes and len(self.grid(arm)) > 1 and fields.get(name) in (0, "0"):
                    raise ValueError(
                        f"{name} is 0: the learning rate is chosen on dev rows; raise it, or give "
                        "every arm one lr"
                    )
        runs = len(self.tasks) * sum(
            len(self.seeds) + self.most_tries(arm) for arm in self.arms if arm.tunes
        )
        if runs > MANY:
            raise ValueError(
                f"arms, seeds and tasks make {runs} runs: at most {MANY}; leave some out"
            )
        return self

    def _try_jobs(self, arm: Arm) -> None:
        """Build an arm's jobs once, so that a wrong field is found before anything starts.

        Raises:
            ValueError: a field is wrong, or the budget is below one step.
        """
        try:
            for task in self.tasks:
                for seed in (*self.seeds, self.search_seed):
                    self.job(arm, task, seed)
                self.job(arm, task, self.search_seed, searching=True)
        except ValidationError as error:
            raise ValueError(f"arm {arm.name!r}: {explain(error).rstrip('.')}") from error

    # -- what follows from it -----------------------------------------------------------------

    @property
    def model(self) -> str:
        """The model that every arm tunes."""
        return str(self.common.get("model", "demo"))

    @property
    def baseline_arm(self) -> Arm:
        """The arm that others are held against: as asked for, else the full scope, else the first.

        Zero-shot is the baseline only if it is asked for.
        """
        tuned = [arm for arm in self.arms if arm.tunes]
        full = (a for a in tuned if (a.scope, a.optimizer) == ("full", "zo-sgd"))
        asked = (a for a in self.arms if a.name == self.baseline)
        return next(asked, None) or next(full, tuned[0])

    @property
    def wants_profiles(self) -> bool:
        """Whether a scan and a probe of the model are part of the comparison."""
        singles = [a for a in self.arms if a.tunes and a.scope.startswith("layer:")]
        return len(singles) >= LEAST_LAYERS if self.profiles is None else self.profiles

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def budget(self, searching: bool = False) -> int:
        """Forward passes of a run; ``searching``: of a run that tries a learning rate."""
        common = self.common | {"warmup_steps": 0, "task": self.tasks[0]}
        reference = passes_per_step(TuneJob.model_validate(common))
        if searching and self.search_steps is not None:
            return self.search_steps * reference
        if self.forward_passes is not None:
            return self.forward_passes
        assert self.steps is not None
        return self.steps * reference

    def grid(self, arm: Arm) -> list[float]:
        """The learning rates that an arm chooses from."""
        if arm.lr is not None:
            return arm.lr
        middle = recommended_lr(self.model, arm.scope, arm.optimizer)
        return sorted({float(f"{middle * factor:.6g}") for factor in self.lr_factors})

    def most_tries(self, arm: Arm) -> int:
        """Learning rates that are tried at most; 1 if there is one only, which is not tried."""
        given = len(self.grid(arm))
        return given + self.lr_extensions if given > 1 else 1

    def scan_job(self) -> ScanJob:
        """The activation scan of the model, on the bundled passages."""
        names = ModelFields.model_fields.keys()
        return ScanJob.model_validate({n: v for n, v in self.common.items() if n in names})

    def probe_job(self, task: str) -> ProbeJob:
        """The sensitivity probe of the model on a task."""
        names = ProbeJob.model_fields.keys() & COMMON
        fields = {n: v for n, v in self.common.items() if n in names}
        return ProbeJob.model_validate(fields | {"task": task, "seed": self.search_seed})

    def job(
        self, arm: Arm, task: str, seed: int, lr: float | None = None, searching: bool = False
    ) -> TuneJob:
        """The tuning job of one cell.

        Raises:
            ValidationError: a field is wrong.
            ValueError: the budget does not pay for one step.
        """
        fields = self.common | arm.settings
        fields |= {"scope": arm.scope.replace("{seed}", str(seed)), "optimizer": arm.optimizer}
        fields |= {"task": task, "seed": seed, "lr": lr or self.grid(arm)[0]}
        budget = self.budget(searching)
        cost = passes_per_step(TuneJob.model_validate(fields | {"steps": 10_000_000}))
        steps = budget // cost
        if not steps:
            raise ValueError(
                f"arm {arm.name!r} needs {cost} forward passes a step, and the budget is {budget}: "
                "raise steps or forward_passes"
            )
        if "eval_every" not in fields:
            fields["eval_every"] = max(1, -(-steps // self.evaluations))
        return TuneJob.model_validate(fields | {"steps": steps})


def _known(given: Mapping[str, Any], names: frozenset[str]) -> None:
    unknown = sorted(set(given) - names)
    if unknown:
        raise ValueError(
            f"has no field {', '.join(unknown)} that can be set here: choose "
            f"{', '.join(sorted(names))}"
        )
