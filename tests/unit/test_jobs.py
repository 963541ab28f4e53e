"""Job specs: one sentence for every wrong field, and the command line gives the same job back."""

import math
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from zo_core.cli.options import with_job_options
from zo_core.jobs import (
    JOB,
    KINDS,
    Bos,
    Dtype,
    ExportJob,
    ForwardPath,
    Keep,
    LoadJob,
    MechanismJob,
    Noise,
    PreviewJob,
    ProbeJob,
    ReplayJob,
    Rule,
    Scaling,
    ScanJob,
    TextSource,
    TrackerName,
    TuneJob,
    command_line,
    explain,
    recommended_lr,
)
from zo_core.scope_spec import FORMS, spell
from zo_core.scope_spec import parse as parse_scope

WITH_OPTIONS = ("scan", "mechanism", "probe", "tune", "preview")


def sentence_for(fields: dict[str, Any]) -> str:
    """What a user reads who gives these fields."""
    with pytest.raises(ValidationError) as caught:
        JOB.validate_python(fields)
    return explain(caught.value)


BAD: list[tuple[str, str, object, str]] = [
    ("tune", "eps", 0, "greater than or equal to 0.00000001"),
    ("tune", "eps", -1e-3, "greater than or equal to 0.00000001"),
    ("tune", "eps", math.nan, "is 'nan':"),
    ("probe", "eps", math.inf, "less than or equal to 10"),
    ("probe", "eps", "small", "valid number"),
    ("tune", "steps", 0, "greater than or equal to 1"),
    ("tune", "steps", -1, "greater than or equal to 1"),
    ("tune", "steps", 1.5, "valid integer"),
    ("tune", "steps", "many", "valid integer"),
    ("tune", "scope", "layer:one", "choose full, layer:<k>, layers:<list>"),
    ("tune", "scope", "layer:-1", "choose full, layer:<k>, layers:<list>"),
    ("tune", "scope", "", "choose full, layer:<k>, layers:<list>"),
    ("tune", "scope", " full", "choose full, layer:<k>, layers:<list>"),
    ("tune", "scope", "layers:", "where <k> is auto or a 0-based layer"),
    ("tune", "scope", "layers:1,", "where <k> is auto or a 0-based layer"),
    ("tune", "scope", "channels:3:top1", "channels:<k>:top<p>% or rest<p>%"),
    ("tune", "scope", "channels:3:top0%", "a percentage above 0 and below 100"),
    ("tune", "scope", "sparse:100", "a percentage above 0 and below 100"),
    ("tune", "scope", "random-layer:auto", "random-layer:<seed>"),
    ("tune", "optimizer", "adam", "'zo-sgd', 'momentum', 'sign'"),
    ("tune", "momentum", 1, "less than 1"),
    ("tune", "beta2", -0.1, "greater than or equal to 0"),
    ("tune", "directions", 0, "greater than or equal to 1"),
    ("tune", "accumulate", 0, "greater than or equal to 1"),
    ("tune", "estimator", "three-sided", "'two-sided' or 'one-sided'"),
    ("tune", "schedule", "step", "'constant', 'linear' or 'cosine'"),
    ("tune", "warmup_steps", 1000, "must be below steps"),
    ("tune", "precision", "fp8", "'fp32-master', 'inplace' or 'fp32'"),
    ("replay", "run", "../x", "pattern"),
    ("export", "run", "20260101-000000-scan-0000aa", "pattern"),
    ("tune", "lr", 0, "greater than 0"),
    ("tune", "lr", math.nan, "is 'nan':"),
    ("tune", "weight_decay", -0.1, "greater than or equal to 0"),
    ("tune", "weight_decay", 2, "less than or equal to 1"),
    ("tune", "batch_size", 0, "greater than or equal to 1"),
    ("tune", "seed", -1, "greater than or equal to 0"),
    ("tune", "seed", 2**31, "less than 2147483648"),
    ("tune", "rule", "sun", "'emergence', 'massive', 'systematic' or 'zscore'"),
    ("tune", "noise", "uniform", "'gaussian', 'rademacher' or 'sphere'"),
    ("tune", "path", "quick", "'auto', 'fast' or 'reference'"),
    ("tune", "task", "../sst2", "pattern"),
    ("tune", "verbalizers", "0", "write label=word, as 0=terrible,1=great"),
    ("probe", "verbalizers", {"0": "a", "1": "b,c"}, "cannot hold a comma"),
    ("preview", "template", "It was", "names no field"),
    ("preview", "rows", 0, "greater than or equal to 1"),
    ("tune", "dev_examples", -1, "greater than or equal to 0"),
    ("tune", "train_examples", 0, "greater than or equal to 1"),
    ("tune", "eval_examples", 0, "greater than or equal to 1"),
    ("tune", "eval_every", -1, "greater than or equal to 0"),
    ("tune", "keep", "first", "'best' or 'last'"),
    ("tune", "patience", -1, "greater than or equal to 0"),
    ("tune", "track", "mlflow", "'tensorboard', 'trackio' or 'wandb'"),
    ("tune", "track", [{}], "'tensorboard', 'trackio' or 'wandb'"),
    ("tune", "checkpoint_every", 0, "greater than or equal to 1"),
    ("probe", "draws", 0, "greater than or equal to 1"),
    ("probe", "layers", [], "0-based layer indices"),
    ("probe", "layers", [3, -1], "0-based layer indices"),
    ("probe", "layers", ["x"], "valid integer"),
    ("probe", "batches", 0, "greater than or equal to 1"),
    ("probe", "eps_sweep", [1e-3, 1e-2], "at least three different values"),
    ("probe", "eps_sweep", [1e-3, 1e-2, 20.0], "between 1e-8 and 10"),
    ("probe", "eps_sweep", "1e-3,x,1", "valid number"),
    ("probe", "scalings", "count,size", "is not valid"),
    ("mechanism", "channels", 0, "greater than or equal to 1"),
    ("mechanism", "max_tokens", 3, "greater than or equal to 4"),
    ("mechanism", "text", "book", "is not valid"),
    ("scan", "dtype", "int8", "'auto', 'float32', 'bfloat16' or 'float16'"),
    ("scan", "device", "gpu", "'auto', 'cpu' or 'cuda'"),
    ("scan", "device", "cuda:0", "'auto', 'cpu' or 'cuda'"),
    ("scan", "bos", "maybe", "'auto', 'add' or 'none'"),
    ("scan", "text", "book", "'sample', 'prompt' or 'task'"),
    ("scan", "sequences", 0, "greater than or equal to 1"),
    ("scan", "max_tokens", 3, "greater than or equal to 4"),
    ("scan", "model", "", "at least 1 character"),
    ("scan", "model", "   ", "give demo, a hub id such as gpt2, or a folder"),
    ("scan", "model", "m" * 513, "at most 512 characters"),
    ("load", "model", "", "at least 1 character"),
    ("scan", "steps", 5, "is not a field of this job"),
    ("tune", "learning_rate", 1e-3, "is not a field of this job"),
    ("unload", "model", "demo", "is not a field of this job"),
]


@pytest.mark.parametrize(("kind", "field", "value", "words"), BAD)
def test_bad_field_is_named_in_one_sentence(
    kind: str, field: str, value: object, words: str
) -> None:
    sentence = sentence_for({"kind": kind, field: value})
    assert sentence.startswith(f"{field} ") or sentence.startswith(f"{field}.")
    assert words in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "pydantic" not in sentence.lower()
    assert "Value error" not in sentence
    assert len(sentence) < 700


@pytest.mark.parametrize("prompt", [None, "", " \n"])
def test_prompt_must_not_be_empty(prompt: str | None) -> None:
    sentence = sentence_for({"kind": "scan", "text": "prompt", "prompt": prompt})
    assert sentence == "prompt is empty: type a few words, or choose text=sample."


def test_several_bad_fields_are_all_named() -> None:
    sentence = sentence_for({"kind": "tune", "steps": 0, "eps": 0, "scope": "x"})
    assert [part.split()[0] for part in sentence.split("; ")] == ["eps", "scope", "steps"]


@pytest.mark.parametrize("fields", [{}, {"kind": "sweep"}])
def test_unknown_kind_lists_the_kinds(fields: dict[str, Any]) -> None:
    sentence = sentence_for(fields)
    assert "kind" in sentence
    if fields:
        assert all(f"'{kind}'" in sentence for kind in KINDS)


def test_a_spec_stays_valid_when_it_is_changed() -> None:
    job = TuneJob()
    with pytest.raises(ValidationError):
        job.steps = 0
    with pytest.raises(ValidationError):
        job.scope = "layer:x"
    assert (job.steps, job.scope) == (1000, "layer:auto")


@pytest.mark.parametrize("scope", ["full\n", "layer:3\n"])
def test_scope_with_a_newline_is_refused(scope: str) -> None:
    assert "choose full" in sentence_for({"kind": "tune", "scope": scope})


GO_TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"precision": "fp32", "dtype": "bfloat16"}, "precision fp32 loads float32 weights"),
    ({"optimizer": "adamw", "precision": "inplace"}, "precision inplace is for zeroth-order"),
    ({"optimizer": "adamw", "directions": 2}, "directions is for zeroth-order optimizers"),
    ({"optimizer": "adamw", "estimator": "one-sided"}, "estimator is for zeroth-order"),
    ({"optimizer": "adamw", "path": "fast"}, "path fast is not possible: adamw"),
    ({"precision": "inplace", "path": "fast"}, "path fast is not possible: precision inplace"),
    ({"scope": "prefix", "path": "fast"}, "path fast is not possible: a prefix"),
    ({"suffix": "fp8", "path": "reference"}, "suffix fp8 is not possible: the reference"),
    (
        {"suffix": "fp8", "estimator": "one-sided"},
        "suffix fp8 is not possible: estimator one-",
    ),
    ({"suffix": "fp8", "directions": 2}, "suffix fp8 is not possible: more than two points"),
    (
        {"suffix": "fp8", "scope": "full"},
        "suffix fp8 is not possible: scope full",
    ),
    (
        {"suffix": "fp8", "optimizer": "adamw"},
        "suffix fp8 is not possible: adamw",
    ),
    ({"steps": 5, "warmup_steps": 5}, "warmup_steps must be below steps"),
]


@pytest.mark.parametrize(("fields", "words"), GO_TOGETHER)
def test_fields_that_do_not_go_together(fields: dict[str, Any], words: str) -> None:
    sentence = sentence_for({"kind": "tune", **fields})
    assert sentence.startswith(words)
    assert sentence.endswith(".")


def test_scope_names_and_what_auto_means() -> None:
    """Every form's example parses; auto is replaced, and said, everywhere it may stand."""
    for form in FORMS.values():
        assert parse_scope(form.example).form == form.name
    both = parse_scope("layers:auto,30").resolve(1)
    assert (both.needs_rule, both.layers) == (False, (1, 30))
    assert parse_scope("layers:3,1,auto").resolve(3).layers == (1, 3)
    rest = parse_scope("channels:auto:rest0.5%")
    assert (rest.percent, rest.rest, rest.needs_rule) == (0.5, True, True)
    assert parse_scope("lora").layers == ()
    assert parse_scope("sparse:25") == parse_scope("sparse:25%")
    assert parse_scope("random-layer:7").needs_rule
    assert spell("channels:auto:top1%", 3) == "channels:3:top1%"
    assert spell("all-but:auto", None) == "all-but:auto"


def test_probe_layers_are_sorted_and_single() -> None:
    assert ProbeJob(layers=[3, 0, 3]).layers == [0, 3]


def test_recommended_lr_is_used_when_none_is_given() -> None:
    assert TuneJob().effective_lr == recommended_lr("demo", "layer:auto")
    assert TuneJob(scope="full").effective_lr < TuneJob().effective_lr
    assert TuneJob(model="gpt2").effective_lr == 1e-6
    assert TuneJob(optimizer="momentum").effective_lr == TuneJob().effective_lr * 0.1
    for form in FORMS.values():
        assert 0 < recommended_lr("demo", form.example, "adamw") <= 1
    assert TuneJob(lr=0.5).effective_lr == 0.5


# -- the command line ------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
names = text.filter(lambda s: s.strip()).map(str.strip)
paths = st.none() | names.map(Path)
small = st.integers(1, 4096)
model_fields: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["demo", "gpt2", "Qwen/Qwen3-8B", "/a folder/with $HOME"]) | names,
    "revision": st.none() | text,
    "dtype": st.sampled_from(get_args(Dtype)),
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
}
task_fields: dict[str, st.SearchStrategy[Any]] = model_fields | {
    "task": st.from_regex(r"[a-z0-9_-]{1,64}", fullmatch=True).filter(lambda t: t != "own"),
    "data_dir": paths,
    "batch_size": small,
    "seed": st.integers(0, 2**31 - 1),
    "eps": st.floats(1e-8, 10),
    "noise": st.sampled_from(get_args(Noise)),
}
JOBS: dict[str, st.SearchStrategy[BaseModel]] = {
    "scan": st.builds(
        ScanJob,
        **model_fields,
        text=st.sampled_from(get_args(TextSource)),
        prompt=text.filter(lambda s: s.strip()),
        task=task_fields["task"],
        data_dir=paths,
        sequences=small,
        max_tokens=st.integers(4, 131_072),
        batch_size=small,
        bos=st.sampled_from(get_args(Bos)),
    ),
    "mechanism": st.builds(
        MechanismJob,
        **model_fields,
        text=st.sampled_from(get_args(TextSource)),
        prompt=text.filter(lambda s: s.strip()),
        sequences=small,
        rule=st.sampled_from(get_args(Rule)),
        channels=st.integers(1, 64),
    ),
    "probe": st.builds(
        ProbeJob,
        **task_fields,
        draws=st.integers(1, 10_000),
        layers=st.none() | st.lists(st.integers(0, 200), min_size=1, max_size=9),
        batches=st.integers(1, 64),
        eps_sweep=st.just([]) | st.lists(st.floats(1e-8, 10), min_size=3, max_size=9, unique=True),
        scalings=st.lists(st.sampled_from(get_args(Scaling))),
    ),
    "tune": st.builds(
        TuneJob,
        **task_fields,
        scope=st.sampled_from([f.example for f in FORMS.values() if f.name != "prefix"])
        | st.integers(0, 999).map("layer:{}".format),
        optimizer=st.sampled_from(["zo-sgd", "momentum", "sign", "conservative", "adamm"]),
        momentum=st.floats(0, 0.999),
        directions=small.map(lambda n: min(n, 1024)),
        accumulate=small,
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        rule=st.sampled_from(get_args(Rule)),
        steps=st.integers(1, 10_000_000),
        lr=st.none() | st.floats(0, 1e3, exclude_min=True),
        weight_decay=st.floats(0, 1),
        train_examples=small,
        dev_examples=st.none() | st.integers(0, 500),
        eval_examples=small,
        eval_every=st.integers(0, 10_000),
        keep=st.sampled_from(get_args(Keep)),
        track=st.lists(st.sampled_from(get_args(TrackerName))),
        checkpoint_every=small,
        path=st.sampled_from(get_args(ForwardPath)),
    ),
}

words = names.filter(lambda s: not set(s) & set(",=\n"))
own_fields: dict[str, st.SearchStrategy[Any]] = {
    "task": st.just("own"),
    "task_file": names.map(Path),
    "template": text.map(lambda s: s.replace("{", "{{").replace("}", "}}") + "{a b}\n"),
    "verbalizers": st.lists(words, min_size=4, max_size=8, unique=True).map(
        lambda w: dict(zip(w[::2], w[1::2], strict=False))
    ),
    "label_field": names,
}
JOBS["own"] = st.builds(TuneJob, **task_fields | own_fields)
JOBS["preview"] = st.builds(PreviewJob, **model_fields | own_fields, rows=st.integers(1, 100))


def parse(line: str) -> BaseModel:
    """The job that a command line stands for, through the real options, launching nothing."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "zo_core"]
    seen: list[dict[str, Any]] = []
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    def command(fields: dict[str, Any]) -> None:
        seen.append(fields)

    app.command()(with_job_options(words[3])(command))
    result = CliRunner().invoke(app, words[4:])
    assert result.exit_code == 0, result.output
    return JOB.validate_python(seen[0])


@settings(deadline=None, max_examples=150)
@given(job=st.one_of(*JOBS.values()))
def test_command_line_gives_the_same_job_back(job: BaseModel) -> None:
    assert parse(command_line(job)) == job
    assert JOB.validate_json(job.model_dump_json()) == job, "job.json too"


@pytest.mark.parametrize("kind", WITH_OPTIONS)
def test_defaults_give_a_short_command(kind: str) -> None:
    job = KINDS[kind]()
    assert command_line(job) == f"python -m zo_core {kind} --model demo"
    assert parse(command_line(job)) == job


@pytest.mark.parametrize("kind", WITH_OPTIONS)
def test_every_field_has_an_option_with_its_name(kind: str) -> None:
    app = typer.Typer()
    app.command()(with_job_options(kind)(lambda fields: None))  # noqa: ARG005
    options = {o for p in typer.main.get_command(app).params for o in p.opts}
    wanted = {f"--{n.replace('_', '-')}" for n in KINDS[kind].model_fields if n != "kind"}
    assert wanted <= options


def test_values_that_a_shell_would_change_are_quoted() -> None:
    prompt = 'it\'s $5; `rm` "x"\n--model gpt2 *'
    job = ScanJob(text="prompt", prompt=prompt, model="-strange name")
    again = parse(command_line(job))
    assert again == job
    assert "\n" not in command_line(LoadJob())


def test_command_of_an_export() -> None:
    run = "20260101-000000-tune-0000aa"
    job = ExportJob(run=run, form="model", out=Path("my model"), force=True)
    assert command_line(job) == (
        f"python -m zo_core export {run} --form model --out 'my model' --force"
    )
    with pytest.raises(ValidationError, match="ledger does not go with run"):
        ReplayJob(run=run, ledger=Path("x"), out=Path("y"))
    with pytest.raises(ValidationError, match="run is missing: give the id of a tuning run, or"):
        ReplayJob(out=Path("y"))
    with pytest.raises(ValidationError, match="out is missing: name the file"):
        ReplayJob(ledger=Path("x"))
