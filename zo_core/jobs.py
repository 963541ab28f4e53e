"""Job specs: the one description of a job that the form, the command line and the run store share.

Field names are the names used everywhere: widgets, command-line flags (``batch_size`` is
``--batch-size``), ``job.json`` and CSV headers. A spec validates itself when it is built, before
anything is loaded; :func:`explain` turns a validation error into one sentence.
"""

import math
import shlex
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from zo_core import scope_spec
from zo_core.learning_rates import recommended_lr
from zo_core.own_spec import check_template, parse_verbalizers
from zo_core.run_jobs import Device, ExportJob, ReplayJob
from zo_core.suffix_spec import Suffix, fp8_impossible

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Noise = Literal["gaussian", "rademacher", "sphere"]
Rule = Literal["emergence", "massive", "systematic", "zscore"]
TextSource = Literal["sample", "prompt", "task"]
Bos = Literal["auto", "add", "none"]
Placement = Literal["resident", "offload", "stream"]
ForwardPath = Literal["auto", "fast", "reference"]
Optimizer = Literal["zo-sgd", "momentum", "sign", "conservative", "adamm", "adamw"]
Estimator = Literal["two-sided", "one-sided"]
Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["fp32-master", "inplace", "fp32"]
Keep = Literal["best", "last"]
Scaling = Literal["count", "rms", "output"]
TrackerName = Literal["tensorboard", "trackio", "wandb"]


class ModelFields(BaseModel):
    """Which model, in which precision, on which device."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: str = Field("demo", min_length=1, max_length=512, description="demo, a hub id or a path")
    revision: str | None = Field(None, max_length=128, description="hub branch, tag or commit")
    dtype: Dtype = Field("auto", description="auto: float32 on CPU, bfloat16 on a GPU")
    device: Device = Field("auto", description="auto: GPU if any; the engine picks which")

    @field_validator("model")
    @classmethod
    def _model_is_a_name(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty: give demo, a hub id such as gpt2, or a folder")
        return value.strip()


class TaskChoice(ModelFields):
    """A job that needs a task: a known one, or the user's own rows, template and verbalizers."""

    task: str = Field("reviews", pattern=r"^[a-z0-9_-]{1,64}$", description="task name, or own")
    data_dir: Path | None = Field(
        None, description="folder of <task>/{train,validation}.jsonl[.gz]|parquet"
    )
    task_file: Path | None = Field(
        None, description="own: CSV, JSONL or Parquet file, or a folder with train and validation"
    )
    template: str | None = Field(
        None, max_length=10_000, description='own: the prompt, as "{sentence} It was"'
    )
    verbalizers: dict[str, str] | None = Field(
        None, description="own: a word for each label value, as 0=terrible,1=great"
    )
    label_field: str = Field(
        "label", min_length=1, max_length=256, description="own: the field of the label"
    )

    @field_validator("verbalizers", mode="before")
    @classmethod
    def _verbalizers_from_text(cls, value: object) -> object:
        return parse_verbalizers(value) if isinstance(value, str) else value

    @field_validator("verbalizers")
    @classmethod
    def _verbalizers_differ(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is None:
            return None
        parts = [*value, *value.values()]
        if len(value) < 2 or not all(p and p == p.strip() for p in parts):
            raise ValueError("need a word for each of at least two labels: 0=terrible,1=great")
        if len(set(value.values())) < len(value):
            raise ValueError("give the same word to two labels: choose different ones")
        if any(c in part for part in parts for c in ",=\n"):
            raise ValueError("cannot hold a comma, an equals sign or a line break in a word")
        return value

    @field_validator("template")
    @classmethod
    def _template_has_fields(cls, value: str | None) -> str | None:
        if value is not None:
            check_template(value)
        return value

    @model_validator(mode="after")
    def _own_is_whole(self) -> "TaskChoice":
        for name in ("task_file", "template", "verbalizers"):
            given = getattr(self, name) is not None
            if self.task == "own" and not given:
                raise ValueError(
                    f"{name} is missing: task=own needs task_file, template and verbalizers"
                )
            if self.task != "own" and given:
                raise ValueError(f"{name} is for task=own only: leave it out, or choose task=own")
        return self


class TaskFields(TaskChoice):
    """A job that scores rows of a task."""

    batch_size: int = Field(16, ge=1, le=4096, description="examples a step")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of z and of the batches")
    eps: float = Field(1e-3, ge=1e-8, le=10, description="perturbation scale")
    noise: Noise = Field("gaussian", description="distribution of z")


class TextFields(TaskChoice):
    """A job that reads texts."""

    text: TextSource = Field("sample", description="bundled passages, own prompt, or task rows")
    prompt: str | None = Field(None, max_length=100_000, description="text, when text=prompt")
    sequences: int = Field(16, ge=1, le=100_000, description="number of texts")
    max_tokens: int = Field(256, ge=4, le=131_072, description="longest sequence, in tokens")
    batch_size: int = Field(8, ge=1, le=4096, description="sequences a forward pass")
    bos: Bos = Field("auto", description="auto: as the tokenizer does; add; none")

    @model_validator(mode="after")
    def _prompt_is_there(self) -> "TextFields":
        if self.text == "prompt" and not (self.prompt or "").strip():
            raise ValueError("prompt is empty: type a few words, or choose text=sample")
        return self


class ScanJob(TextFields):
    """Activation scan: streaming statistics of every part of every block."""

    kind: Literal["scan"] = "scan"
    placement: Placement = Field(
        "resident",
        description="of the weights. offload: what does not fit waits in CPU memory or on disk; "
        "stream: one block at a time from the files",
    )


class MechanismJob(TextFields):
    """Who writes and removes massive activations, what attends to them, what they are for."""

    kind: Literal["mechanism"] = "mechanism"
    sequences: int = Field(8, ge=1, le=10_000, description="number of texts")
    max_tokens: int = Field(128, ge=4, le=131_072, description="longest sequence, in tokens")
    rule: Rule = Field("emergence", description="outlier rule that says whether there are any")
    channels: int = Field(3, ge=1, le=64, description="massive channels followed, at most")


class ProbeJob(TaskFields):
    """Perturbation-sensitivity probe of single layers."""

    kind: Literal["probe"] = "probe"
    draws: int = Field(8, ge=1, le=10_000, description="z draws a layer")
    layers: list[int] | None = Field(None, description="0-based layers; none given: all")
    batches: int = Field(
        1, ge=1, le=64, description="batches for the same z: sign agreement and SNR need two"
    )
    eps_sweep: list[float] = Field(
        [], max_length=64, description="also at these eps, for the linear range"
    )
    scalings: list[Scaling] = Field(
        [], description="also with eps by parameter count, by weight rms, by own output's change"
    )

    @field_validator("eps_sweep", "scalings", mode="before")
    @classmethod
    def _list_from_text(cls, value: object) -> object:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("scalings")
    @classmethod
    def _scalings_differ(cls, value: list[Scaling]) -> list[Scaling]:
        return sorted(set(value))

    @field_validator("eps_sweep")
    @classmethod
    def _sweep_tells_a_range(cls, value: list[float]) -> list[float]:
        if any(not 1e-8 <= eps <= 10 for eps in value):
            raise ValueError("must lie between 1e-8 and 10: for example 1e-4,3e-4,1e-3,3e-3")
        if value and len(set(value)) < 3:
            raise ValueError("needs at least three different values: for example 1e-4,1e-3,1e-2")
        return sorted(set(value))

    @field_validator("layers")
    @classmethod
    def _layers_are_indices(cls, value: list[int] | None) -> list[int] | None:
        if value is None:
            return None
        if not value or min(value) < 0:
            raise ValueError("must be 0-based layer indices, for example 0,3,8")
        return sorted(set(value))


class TuneJob(TaskFields):
    """Fine-tuning of a scope: zeroth-order, or with AdamW as the first-order baseline."""

    kind: Literal["tune"] = "tune"
    scope: str = Field(
        "layer:auto",
        max_length=200,
        description=f"what is tuned: {scope_spec.SYNTAX}; <k> is auto or a 0-based layer",
    )
    rule: Rule = Field("emergence", description="outlier rule that auto follows")
    steps: int = Field(1000, ge=1, le=10_000_000, description="optimizer steps")
    lr: float | None = Field(None, gt=0, le=1e3, description="none given: recommended_lr")
    weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled; not on biases and norms")
    optimizer: Optimizer = Field("zo-sgd", description="adamw: first-order baseline")
    momentum: float = Field(0.9, ge=0, lt=1, description="of optimizer=momentum")
    beta1: float = Field(0.9, ge=0, lt=1, description="of adamm and adamw: mean of gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="of adamm and adamw: mean of squares")
    estimator: Estimator = Field("two-sided", description="one-sided: one forward pass a direction")
    directions: int = Field(1, ge=1, le=1024, description="draws of z a step")
    accumulate: int = Field(1, ge=1, le=4096, description="micro-batches of batch_size a step")
    schedule: Schedule = Field("constant", description="of the learning rate, after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    precision: Precision = Field(
        "fp32-master", description="inplace: weights drift as in published code; fp32: load so"
    )
    train_examples: int = Field(1000, ge=1, description="at most so many training rows")
    dev_examples: int | None = Field(
        None, ge=0, description="training rows held out; none given: 500, or 100 of a small task"
    )
    eval_examples: int = Field(1000, ge=1, description="at most so many validation rows")
    eval_every: int = Field(
        250, ge=0, description="steps between evaluations on dev rows; 0: none, the last is kept"
    )
    keep: Keep = Field("best", description="weights that results are of: best by dev loss, or last")
    patience: int = Field(
        0, ge=0, description="stop after so many dev evaluations without improvement; 0: never"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    path: ForwardPath = Field(
        "auto", description="fast: cached frozen prefix; reference: as the papers"
    )
    suffix: Suffix = Field(
        "model",
        description="arithmetic of the frozen layers above the tuned ones: the model's own, or fp8 "
        "for mean and half difference of the two points (GPU, bfloat16)",
    )
    track: list[TrackerName] = Field(
        [], description="also log to these, in the run folder or local"
    )

    @field_validator("track", mode="before")
    @classmethod
    def _track_from_text(cls, value: object) -> object:
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return sorted({name.strip() for name in names} - {""})
        return value

    @field_validator("scope")
    @classmethod
    def _scope_is_known(cls, value: str) -> str:
        scope_spec.parse(value)
        return value

    @model_validator(mode="after")
    def _fields_go_together(self) -> "TuneJob":
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be below steps: {self.warmup_steps} of {self.steps} leave none"
            )
        if self.patience and not (self.eval_every and self.dev_examples != 0):
            raise ValueError("patience counts dev evaluations: raise eval_every and dev_examples")
        if self.precision == "fp32" and self.dtype not in ("auto", "float32"):
            raise ValueError("precision fp32 loads float32 weights: leave dtype at auto")
        if self.optimizer == "adamw":
            if self.precision == "inplace":
                raise ValueError("precision inplace is for zeroth-order optimizers: not for adamw")
            for name in ("directions", "estimator"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} is for zeroth-order optimizers: leave it out of adamw"
                    )
        if self.path == "fast" and self.reference_only:
            raise ValueError(f"path fast is not possible: {self.reference_only}: choose auto")
        if self.suffix == "fp8" and (why := fp8_impossible(self)):
            raise ValueError(f"suffix fp8 is not possible: {why}: leave suffix at model")
        return self

    @property
    def reference_only(self) -> str:
        """Why only the reference path can run this job; empty if both can."""
        if self.optimizer == "adamw":
            return "adamw takes gradients through the reference path"
        if self.precision == "inplace":
            return "precision inplace moves the weights as published code does"
        if self.scope == "prefix":
            return "a prefix enters through the reference path"
        return ""

    @property
    def effective_lr(self) -> float:
        """The learning rate the run uses, at the top of its schedule."""
        if self.lr is not None:
            return self.lr
        return recommended_lr(self.model, self.scope, self.optimizer)


class PreviewJob(TaskChoice):
    """Rows of a task as the model gets them; loads the tokenizer only."""

    kind: Literal["preview"] = "preview"
    rows: int = Field(5, ge=1, le=100, description="rendered rows")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the split, as in tune")
    dev_examples: int | None = Field(None, ge=0, description="rows held out, as in tune")


class LoadJob(ModelFields):
    """Load a model and keep it resident in the worker."""

    kind: Literal["load"] = "load"


class UnloadJob(BaseModel):
    """Release every resident model."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["unload"] = "unload"


Job = Annotated[
    ScanJob
    | MechanismJob
    | ProbeJob
    | TuneJob
    | PreviewJob
    | ReplayJob
    | ExportJob
    | LoadJob
    | UnloadJob,
    Field(discriminator="kind"),
]
JOB: TypeAdapter[Job] = TypeAdapter(Job)
KINDS: dict[str, type[BaseModel]] = {
    t.model_fields["kind"].default: t for t in get_args(get_args(Job)[0])
}


def explain(error: ValidationError) -> str:
    """One plain sentence for each wrong field, naming the field and what would be right."""
    sentences = []
    for item in error.errors(include_url=False):
        parts = [part for part in item["loc"] if part not in KINDS]
        field = ".".join(part for part in parts if isinstance(part, str))
        message = item["msg"].removeprefix("Value error, ")
        given = item.get("input")
        if item["type"] == "extra_forbidden":
            message = "is not a field of this job"
        elif item["type"] in {"literal_error", "string_pattern_mismatch"}:
            message = f"{given!r} is not valid: {message[0].lower()}{message[1:]}"
        elif not item["type"].startswith("value_error"):
            shown = given if not isinstance(given, float) or math.isfinite(given) else str(given)
            message = f"is {shown!r}: {message[0].lower()}{message[1:]}"
        sentences.append(f"{field} {message}".strip())
    return "; ".join(sentences) + "."


def command_line(job: BaseModel) -> str:
    """The command that launches the same job: only fields that differ from their defaults."""
    words = ["python", "-m", "zo_core", str(job.kind)]  # type: ignore[attr-defined]
    for name, field in type(job).model_fields.items():
        value = getattr(job, name)
        if name == "kind" or (value == field.default and name != "model") or value is None:
            continue
        if isinstance(value, list):
            value = ",".join(str(v) for v in value)
        elif isinstance(value, dict):
            value = ",".join(f"{k}={v}" for k, v in value.items())
        if name == "run":
            words.append(str(value))
        elif value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name.replace('_', '-')}", shlex.quote(str(value))]
    return " ".join(words)
