"""Job specs: the one description of a job that the form, the command line and the run store share.

Field names are the names used everywhere: widgets, command-line flags (``batch_size`` is
``--batch-size``), ``job.json`` and CSV headers. A spec validates itself when it is built, before
anything is loaded; :func:`explain` turns a validation error into one sentence.
"""

import math
import re
import shlex
from pathlib import Path
from string import Formatter
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


class ScanJob(TaskChoice):
    """Activation scan: streaming statistics of every block output."""

    kind: Literal["scan"] = "scan"
    text: TextSource = Field("sample", description="bundled passages, own prompt, or task rows")
    prompt: str | None = Field(None, max_length=100_000, description="text, when text=prompt")
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
    dev_examples: int | None = Field(
        None, ge=0, description="training rows held out; none given: 500, or 100 of a small task"
    )
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
    ScanJob | ProbeJob | TuneJob | PreviewJob | LoadJob | UnloadJob, Field(discriminator="kind")
]
JOB: TypeAdapter[Job] = TypeAdapter(Job)
KINDS: dict[str, type[BaseModel]] = {
    t.model_fields["kind"].default: t for t in get_args(get_args(Job)[0])
}


def parse_verbalizers(text: str) -> dict[str, str]:
    """``0=terrible,1=great`` as a dict.

    Raises:
        ValueError: a part is not ``label=word``, or a label comes twice.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        label, equals, word = (piece.strip() for piece in part.partition("="))
        if not (label and equals and word):
            raise ValueError(f"has {part.strip()!r}: write label=word, as 0=terrible,1=great")
        if label in found:
            raise ValueError(f"name the label {label!r} twice")
        found[label] = word
    return found


def check_template(template: str) -> None:
    """Refuse a template whose fields cannot be read.

    Raises:
        ValueError: a stray brace, something beside a name in braces, or no field at all.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError("has a single brace: write {{ or }} for a brace in the text") from error
    names = [name for _, name, _, _ in parts if name is not None]
    if any(
        not n.strip() or spec or conversion for _, n, spec, conversion in parts if n is not None
    ):
        raise ValueError("has braces that hold more or less than a field's name: write {sentence}")
    if any(c in name for name in names for c in ".[]"):
        raise ValueError("can use plain fields only: no dot or bracket within the braces")
    if not names:
        raise ValueError('names no field: write one in braces, as "{sentence} It was"')


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
        elif isinstance(value, dict):
            value = ",".join(f"{k}={v}" for k, v in value.items())
        words += [f"--{name.replace('_', '-')}", shlex.quote(str(value))]
    return " ".join(words)
