"""Exports of a tuning run: every form loads elsewhere and is the tuned model, and nothing is lost.

The runs are made once, with the recipe itself, on the bundled model.
"""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit import families
from tests.unit.exported import SCOPES, SMALL, export, finished
from zo_core import runs
from zo_core.artifacts.ledger import ledger_bytes, read_ledger
from zo_core.artifacts.place import MANIFEST
from zo_core.artifacts.raw import read_header, sha256
from zo_core.artifacts.source import BEST, LAST, find_source
from zo_core.artifacts.tensors import tensors_bytes
from zo_core.errors import UserError
from zo_core.jobs import ReplayJob, TuneJob
from zo_core.models import resident
from zo_core.models.catalog import DEMO_PATH
from zo_core.progress import JobContext
from zo_core.recipes.replay import run_replay
from zo_core.recipes.tune import run_tune
from zo_core.runs import Run
from zo_core.scope_spec import parse
from zo_core.settings import settings
from zo_core.zo.checkpoint import read_checkpoint, save_checkpoint
from zo_core.zo.scopes import select
from zo_core.zo.trainer import make_optimizer, make_scope

pytestmark = pytest.mark.usefixtures("own_store")

FOLDERS = {"model", "adapter"}
TOKENS = torch.tensor([[5, 99, 1200, 7, 8000, 42]])


@pytest.fixture(scope="module")
def tuned(own_store: None) -> dict[str, Run]:
    """A finished run of each scope."""
    return {scope: finished(scope) for scope in SCOPES}


def tuned_logits(run: Run) -> torch.Tensor:
    """Logits of the model as the run evaluated it."""
    job = run.job
    assert isinstance(job, TuneJob)
    loaded = resident.acquire(job)
    selection = select(loaded, parse(job.scope), None, job.seed)
    scope = make_scope(job, selection)
    try:
        scope.load(read_checkpoint(run.path / LAST).weights)
        return loaded.model(input_ids=TOKENS).logits
    finally:
        scope.close()
        selection.close()


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("scope", SCOPES)
def test_tensors_are_the_checkpoint_without_the_optimizer(
    tuned: dict[str, Run], scope: str, tmp_path: Path
) -> None:
    run, out = tuned[scope], tmp_path / "tuned.safetensors"
    summary = export(run, "tensors", out)
    saved = read_checkpoint(run.path / LAST)
    found = load_file(out)
    assert found.keys() == saved.weights.keys()
    assert all(torch.equal(found[n], t) for n, t in saved.weights.items())
    manifest = json.loads((tmp_path / "tuned.manifest.json").read_text())
    assert (manifest["run_id"], manifest["scope"], manifest["step"]) == (run.run_id, scope, 3)
    assert manifest["base"]["fingerprint"] == run.status().details["fingerprint"]["base weights"]
    assert manifest["sha256"] == summary["sha256"][out.name] == sha256(out)
    assert {n: tuple(t["shape"]) for n, t in manifest["tensors"].items()} == {
        n: tuple(t.shape) for n, t in found.items()
    }
    entries = sum(t.numel() for t in found.values())
    assert manifest["tuned_share"] == manifest["tuned_parameters"] / entries
    assert (manifest["tuned_share"] < 0.1) == scope.startswith("channels")
    assert tensors_bytes(find_source(run.run_id)).count(run.run_id.encode()) == 1
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["zoscope"])["job"]["scope"] == scope


@pytest.mark.parametrize("scope", ["layer:3", "channels:3:top1%", "lora:3", "full"])
def test_model_folder_is_the_tuned_model(tuned: dict[str, Run], scope: str, tmp_path: Path) -> None:
    run, out = tuned[scope], tmp_path / "model"
    before = logits_of(DEMO_PATH).float()
    summary = export(run, "model", out)
    expected, found = tuned_logits(run), logits_of(out)
    if scope == "lora:3":  # merged
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert "**merged**" in (out / "README.md").read_text()
    else:
        assert torch.equal(found, expected)
    assert (found - before).abs().max() > 1e-3, "it was tuned"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (
        tokenizer("a fine film").input_ids
        == AutoTokenizer.from_pretrained(DEMO_PATH)("a fine film").input_ids
    )
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["files"] == summary["sha256"]
    assert {p.name for p in out.iterdir()} == {MANIFEST, *manifest["files"]}
    for text in (run.run_id, scope, "step 3 of 3", "validation, after tuning"):
        assert text in (out / "README.md").read_text()
    loaded = resident.acquire(run.job)  # type: ignore[arg-type]
    pristine = load_file(DEMO_PATH / "model.safetensors")
    name = "model.layers.3.self_attn.q_proj.weight"
    assert torch.equal(loaded.model.get_parameter(name), pristine[name].float())
    assert loaded.model.config.dtype == torch.float32


def test_adapter_folder_is_the_tuned_model(tuned: dict[str, Run], tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    export(tuned["lora:3"], "adapter", out)
    base = AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        found = model(input_ids=TOKENS).logits
    assert torch.equal(found, tuned_logits(tuned["lora:3"]))
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (8, 16, [3])
    assert out.joinpath("README.md").read_text().startswith("---\nlibrary_name: peft\n")


@pytest.mark.parametrize("scope", SCOPES)
def test_ledger_file_rebuilds_the_tensors(
    tuned: dict[str, Run], scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the run, bit for bit on the CPU."""
    run, ledger, out = tuned[scope], tmp_path / "x.jsonl.gz", tmp_path / "rebuilt.safetensors"
    export(run, "ledger", ledger)
    saved = read_checkpoint(run.path / LAST)
    monkeypatch.setattr(settings(), "cache_dir", tmp_path / "elsewhere")
    job = ReplayJob(ledger=ledger, out=out, model=str(DEMO_PATH), device="cpu")
    made = runs.create(job, None)
    run_replay(job, made, JobContext(made))
    summary = made.result_json()
    assert summary is not None
    assert summary["identical"]
    assert (summary["run_id"], summary["steps"], summary["out"]) == (run.run_id, 3, str(out))
    found = load_file(out)
    assert found.keys() == saved.weights.keys()
    assert all(torch.equal(found[n], t) for n, t in saved.weights.items())
    manifest = json.loads((tmp_path / "rebuilt.manifest.json").read_text())
    assert manifest["rebuilt_from_ledger"]
    assert manifest["sha256"] == sha256(out)


def test_ledger_is_small_and_the_same_each_time(tuned: dict[str, Run]) -> None:
    run = tuned["layer:3"]
    twin = shutil.copytree(run.path, run.path.with_name("20260101-000000-tune-00aa00"))
    try:
        step = next(r for r in run.read_metrics()[0] if r["kind"] == "step")
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(10_000, generator=generator, dtype=torch.float64).tolist()
        records = [step | {"step": n, "g": [g]} for n, g in enumerate(noise, 1)]
        twin.joinpath("metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
        tensors = load_file(twin / LAST)
        save_file(tensors, twin / LAST, metadata={"step": "10000"})
        source = find_source(twin.name, form="ledger")
        data = ledger_bytes(source)
        assert len(data) < 300_000
        lines = [json.loads(line) for line in gzip.decompress(data).splitlines()]
        assert [line["g"] for line in lines[1:]] == [[g] for g in noise], "to the last bit"
        again = gzip.decompress(ledger_bytes(source)).splitlines()[1:]
        assert again == gzip.decompress(data).splitlines()[1:]
    finally:
        shutil.rmtree(twin)


REFUSED = [
    (
        "prefix",
        "model",
        "a prefix is not part of a model's weights. Choose one of: tensors, ledger",
    ),
    ("layer:3", "adapter", "only scopes lora and lora:<k> tune an adapter. Choose one of: tensors"),
    ("full", "adapter", "form: adapter does not fit scope full"),
]


@pytest.mark.parametrize(("scope", "form", "words"), REFUSED)
def test_forms_that_do_not_fit_are_refused(
    tuned: dict[str, Run], scope: str, form: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        export(tuned[scope], form, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_exported() -> None:
    with pytest.raises(UserError, match="No run '20260101-000000-tune-0000aa'"):
        find_source("20260101-000000-tune-0000aa")
    run = runs.create(TuneJob(), runs.Process.current())
    with pytest.raises(UserError, match="is still going on"):
        find_source(run.run_id)
    run.update(state="cancelled")
    with pytest.raises(UserError, match="no checkpoint that can be read: go on with it"):
        find_source(run.run_id)
    (run.path / LAST).write_bytes(b"torn")
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        find_source(run.run_id)
    (run.path / "job.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        find_source(run.run_id)
    adamw = runs.create(TuneJob(optimizer="adamw"), None)
    with pytest.raises(UserError, match="the gradients of adamw are no scalars"):
        find_source(adamw.run_id, form="ledger")


def test_weights_best_last_and_kept(tuned: dict[str, Run], tmp_path: Path) -> None:
    """A run without a best file has its last weights, whatever is asked for."""
    run = tuned["layer:3"]
    copied = Run(shutil.copytree(run.path, run.path.with_name("20260101-000000-tune-00bb00")))
    try:
        for weights in ("kept", "best", "last"):
            source = find_source(copied.run_id, weights)  # type: ignore[arg-type]
            assert (source.weights, source.step) == ("last", 3)
        job = copied.job
        assert isinstance(job, TuneJob)
        loaded = resident.acquire(job)
        scope = make_scope(job, select(loaded, parse(job.scope), None, 0))
        (copied.path / LAST).rename(tmp_path / "kept")
        save_checkpoint(copied, job, scope, make_optimizer(job), 2)
        (copied.path / LAST).rename(copied.path / BEST)
        (tmp_path / "kept").rename(copied.path / LAST)
        summary = copied.result_json()
        assert summary is not None
        assert find_source(copied.run_id).weights == "last", "the summary says nothing"
        for kept, step in (("best", 2), ("last", 3)):
            copied.write_result("summary.json", json.dumps(summary | {"kept": kept}))
            assert (find_source(copied.run_id).weights, find_source(copied.run_id).step) == (
                kept,
                step,
            )
        assert find_source(copied.run_id, "best").step == 2
        out = tmp_path / "best.jsonl.gz"
        assert export(copied, "ledger", out, weights="best")["weights"] == "best"
        assert len(read_ledger(out).records) == 2
    finally:
        shutil.rmtree(copied.path)


def test_an_interrupted_run_says_which_step(tuned: dict[str, Run], tmp_path: Path) -> None:
    run = tuned["lora:3"]
    run.update(state="interrupted")
    try:
        with (run.path / LAST).open("rb") as file:
            assert read_header(file)[0]["step"] == "3"
        summary = export(run, "adapter", tmp_path / "a")
        assert (summary["state"], summary["step"], summary["steps"]) == ("interrupted", 3, 3)
        assert "step 3 of 3, interrupted" in (tmp_path / "a" / "README.md").read_text()
    finally:
        run.update(state="done")


def test_other_base_weights_are_refused(tuned: dict[str, Run], tmp_path: Path) -> None:
    """A ledger, or a model, on a base that is not the one the run began with."""
    run, other = tuned["layer:3"], tmp_path / "base"
    shutil.copytree(DEMO_PATH, other, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = load_file(DEMO_PATH / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    ledger = tmp_path / "l.gz"
    export(run, "ledger", ledger)
    job = ReplayJob(ledger=ledger, out=tmp_path / "o", model=str(other), device="cpu")
    made = runs.create(job, None)
    with pytest.raises(UserError, match="are not those the run began with"):
        run_replay(job, made, JobContext(made))
    assert not (tmp_path / "o").exists()


def test_ledger_files_that_are_none(tuned: dict[str, Run], tmp_path: Path) -> None:
    run, path = tuned["layer:3"], tmp_path / "l.gz"
    with pytest.raises(UserError, match="there is no file"):
        read_ledger(path)
    path.write_text("plain")
    with pytest.raises(UserError, match="is no whole ledger of ZOScope"):
        read_ledger(path)
    whole = ledger_bytes(find_source(run.run_id))
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match="is no whole ledger of ZOScope"):
        read_ledger(path)
    head, *steps = gzip.decompress(whole).splitlines(keepends=True)
    for lines, words in (
        ([head, *steps[:-1]], "is not whole"),
        ([head, *steps[1:]], "step 1 is not as it should be"),
        ([head, b'{"step": 1, "g": [NaN], "lr": 1}\n'], "step 1 is not as it should be"),
        ([head, b'{"step": 1, "g": [1, 2], "lr": 1}\n'], "step 1 is not as it should be"),
        ([head, b"[]\n"], "no JSON object"),
        ([steps[0]], "format"),
        ([head.replace(b'"layer:3"', b'"layer:x"', 1), *steps], "is no whole ledger"),
        ([], "of another kind"),
    ):
        path.write_bytes(gzip.compress(b"".join(lines)))
        with pytest.raises(UserError, match=words):
            read_ledger(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "gemma2"])
def test_other_families(family: str, dtype: str, tmp_path: Path) -> None:
    """Tied embeddings, Conv1D, fused q and v; in bfloat16 the fp32 master is not the weights."""
    base = families.save(families.build(family), tmp_path / "base")
    fields = SMALL | {"model": str(base), "dtype": dtype, "steps": 2}
    kind = getattr(torch, dtype)
    for scope in ("full", "lora:2"):
        job = TuneJob(**fields, scope=scope, lr=1e-4 if scope == "full" else 1e-2)
        run = runs.create(job, None)
        run_tune(job, run, JobContext(run))
        run.update(state="done")
        expected = tuned_logits(run)
        export(run, "model", tmp_path / scope)
        found = logits_of(tmp_path / scope)
        assert found.dtype == kind
        if scope == "full":
            assert torch.equal(found, expected)
            continue
        error = (found - expected).float().norm() / expected.float().norm()
        assert error < (1e-5 if dtype == "float32" else 2e-2)  # merged: rounded once more
        export(run, "adapter", tmp_path / "adapter")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=kind)
        with torch.no_grad():
            before = plain(input_ids=TOKENS).logits
            model = PeftModel.from_pretrained(
                plain, tmp_path / "adapter", autocast_adapter_dtype=False
            ).eval()
            after = model(input_ids=TOKENS).logits
        assert torch.equal(after, expected)
        if dtype == "float32":  # two small steps may round away in bfloat16
            assert not torch.equal(after, before)
    resident.clear()
