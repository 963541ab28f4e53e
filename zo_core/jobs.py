"""Job specs: the one description of a job that the form, the command line and the run store share.

Field names are the names used everywhere: widgets, command-line flags (``batch_size`` is
``--batch-size``), ``job.json`` and CSV headers. A spec validates itself when it is built, before
anything is loaded; :func:`explain` turns a validation error into one sentence.
"""

import math
import re
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

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Noise = Literal["gaussian", "rademacher"]
Rule = Literal["emergence", "massive", "systematic"]
TextSource = Literal["sample", "prompt", "task"]
Bos = Literal["auto", "add", "none"]
ForwardPath = Literal["auto", "fast", "reference"]

DEMO_LAYER_LR = 5e-4
DEMO_FULL_LR = 1e-5
PAPER_LR = 1e-6
"""Middle of the paper's grid {1e-7, 5e-7, 1e-6, 5e-6}, used for every model but the demo."""

SCOPE_PATTERN = re.compile(r"full|layer:(auto|\d+)")


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


class TaskFields(ModelFields):
    """A job that scores rows of a task."""

    task: str = Field("reviews", pattern=r"^[a-z0-9_-]{1,64}$", description="task name")
    data_dir: Path | None = Field(
        None, description="folder of <task>/{train,validation}.jsonl[.gz]|parquet"
    )
    batch_size: int = Field(16, ge=1, le=4096, description="examples a step")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of z and of the batches")
    eps: float = Field(1e-3, ge=1e-8, le=10, description="perturbation scale")
    noise: Noise = Field("gaussian", description="distribution of z")


class ScanJob(ModelFields):
    """Activation scan: streaming statistics of every block output."""

    kind: Literal["scan"] = "scan"
    text: TextSource = Field("sample", description="bundled passages, own prompt, or task rows")
    prompt: str | None = Field(None, max_length=100_000, description="text, when text=prompt")
    task: str = Field("reviews", pattern=r"^[a-z0-9_-]{1,64}$", description="when text=task")
    data_dir: Path | None = Field(None, description="local task data, when text=task")
    sequences: int = Field(16, ge=1, le=100_000, description="number of texts")
    max_tokens: int = Field(256, ge=4, le=131_072, description="longest sequence, in tokens")
    batch_size: int = Field(8, ge=1, le=4096, description="sequences a forward pass")
    bos: Bos = Field("auto", description="auto: as the tokenizer does; add; none")

    @model_validator(mode="after")
    def _prompt_is_there(self) -> "ScanJob":
        if self.text == "prompt" and not (self.prompt or "").strip():
            raise ValueError("prompt is empty: type a few words, or choose text=sample")
        return self


class ProbeJob(TaskFields):
    """Perturbation-sensitivity probe of single layers."""

    kind: Literal["probe"] = "probe"
    draws: int = Field(8, ge=1, le=10_000, description="z draws a layer")
    layers: list[int] | None = Field(None, description="0-based layers; none given: all")

    @field_validator("layers")
    @classmethod
    def _layers_are_indices(cls, value: list[int] | None) -> list[int] | None:
        if value is None:
            return None
        if not value or min(value) < 0:
            raise ValueError("must be 0-based layer indices, for example 0,3,8")
        return sorted(set(value))


class TuneJob(TaskFields):
    """Zeroth-order fine-tuning of a scope with ZO-SGD."""

    kind: Literal["tune"] = "tune"
    scope: str = Field("layer:auto", description="full, layer:auto or layer:<k>, 0-based")
    rule: Rule = Field("emergence", description="outlier rule that layer:auto follows")
    steps: int = Field(1000, ge=1, le=10_000_000, description="ZO-SGD steps")
    lr: float | None = Field(None, gt=0, le=1e3, description="none given: recommended_lr")
    weight_decay: float = Field(0.0, ge=0, le=1)
    train_examples: int = Field(1000, ge=1, description="at most so many training rows")
    eval_examples: int = Field(1000, ge=1, description="at most so many validation rows")
    eval_every: int = Field(250, ge=0, description="steps between evaluations; 0: only the ends")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    path: ForwardPath = Field(
        "auto", description="fast: cached frozen prefix; reference: as the papers"
    )

    @field_validator("scope")
    @classmethod
    def _scope_is_known(cls, value: str) -> str:
        if not SCOPE_PATTERN.fullmatch(value):
            raise ValueError(
                f"{value!r} is unknown: choose full, layer:auto or layer:<k>, as layer:3"
            )
        return value

    @property
    def effective_lr(self) -> float:
        """The learning rate the run uses."""
        return self.lr if self.lr is not None else recommended_lr(self.model, self.scope)


class LoadJob(ModelFields):
    """Load a model and keep it resident in the worker."""

    kind: Literal["load"] = "load"


class UnloadJob(BaseModel):
    """Release every resident model."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["unload"] = "unload"


Job = Annotated[ScanJob | ProbeJob | TuneJob | LoadJob | UnloadJob, Field(discriminator="kind")]
JOB: TypeAdapter[Job] = TypeAdapter(Job)
KINDS: dict[str, type[BaseModel]] = {
    t.model_fields["kind"].default: t for t in get_args(get_args(Job)[0])
}


def recommended_lr(model: str, scope: str) -> float:
    """Learning rate used when none is given.

    Measured for the demo model (README, "Results"); the middle of the paper's grid otherwise.
    """
    if model != "demo":
        return PAPER_LR
    return DEMO_FULL_LR if scope == "full" else DEMO_LAYER_LR


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
        words += [f"--{name.replace('_', '-')}", shlex.quote(str(value))]
    return " ".join(words)
