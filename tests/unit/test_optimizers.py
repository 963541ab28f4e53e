"""Optimizers: their rules, replay and resume of every one, and the first-order baseline."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from tests.unit import families
from zo_core import runs
from zo_core.jobs import ModelFields, Optimizer, Schedule, TuneJob
from zo_core.models.load import LoadedModel, load
from zo_core.recipes.replay import compare
from zo_core.scope_spec import parse
from zo_core.settings import settings
from zo_core.tasks.data import load_task
from zo_core.tasks.scoring import task_loss
from zo_core.tasks.templates import encode
from zo_core.zo import estimator, first_order
from zo_core.zo.checkpoint import restore_run, save_checkpoint
from zo_core.zo.first_order import AdamW, gradients_of
from zo_core.zo.inplace import InplaceScope
from zo_core.zo.optimizers import OPTIMIZERS, AdaMM, Momentum, Sign
from zo_core.zo.reference import ReferenceForward
from zo_core.zo.schedule import learning_rate
from zo_core.zo.scope import Draw, Point, TunedScope
from zo_core.zo.scopes import select
from zo_core.zo.trainer import Progress, make_optimizer, replay, train

ROWS = list(range(24))
BLOCKLESS: Any = SimpleNamespace(decoder=SimpleNamespace(blocks=()))


class Bowl:
    """A loss of a matrix and a bias, in place of a model: fast enough for 200 steps."""

    name = "bowl"

    def __init__(self, scope: TunedScope) -> None:
        """Read the weights from a scope."""
        self._scope = scope

    def prepare(self, examples: Sequence[int]) -> Any:
        """The rows themselves."""
        label = torch.zeros(len(examples))
        return SimpleNamespace(scored=SimpleNamespace(label=label), rows=list(examples))

    def logits(self, prepared: Any) -> torch.Tensor:
        """The loss at the working weights."""
        w, b = (p.float() for p in self._scope.parameters.values())
        target = torch.tensor(prepared.rows).float()[:, None].sin() / 10
        return ((w.sum(0) + b - target) ** 2).mean() + (w**2).mean()

    def logits_at(self, prepared: Any, scope: TunedScope, where: Sequence[Point]) -> torch.Tensor:
        """The loss at every point."""
        found = []
        for point in where:
            scope.perturb(point)
            found.append(self.logits(prepared))
        return torch.stack(found)


def start(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (5, 7), "w.bias": (7,)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


MASK = {"w": torch.arange(35).view(5, 7) % 3 != 0}


def fresh(job: TuneJob) -> tuple[TunedScope, Any]:
    dtype = torch.float32 if job.precision == "fp32" else torch.bfloat16
    kind = InplaceScope if job.precision == "inplace" else TunedScope
    return kind(start(dtype), MASK), make_optimizer(job)


@pytest.fixture(autouse=True)
def _bowl_has_its_own_loss(monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    if "real_loss" not in request.keywords:
        for module in (estimator, first_order):
            monkeypatch.setattr(module, "task_loss", lambda logits, scored: logits)  # noqa: ARG005


def run(job: TuneJob, scope: TunedScope, optimizer: Any, progress: Progress, on_step: Any) -> None:
    train(job, BLOCKLESS, Bowl(scope), scope, optimizer, ROWS, progress, on_step)


CASES = [
    *({"optimizer": o} for o in OPTIMIZERS),
    *({"optimizer": o, "precision": "inplace"} for o in OPTIMIZERS),
    {"precision": "fp32", "noise": "sphere"},
    {"estimator": "one-sided", "directions": 3, "accumulate": 2, "schedule": "cosine"},
    {
        "precision": "inplace",
        "estimator": "one-sided",
        "directions": 2,
        "accumulate": 2,
        "optimizer": "conservative",
    },
    {"noise": "rademacher", "warmup_steps": 20, "schedule": "linear", "optimizer": "adamm"},
]
COMMON = {"steps": 200, "batch_size": 4, "lr": 1e-2, "eps": 1e-2, "weight_decay": 0.05}


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_replay_of_200_steps_gives_the_same_bits(fields: dict[str, Any]) -> None:
    """Base weights + ledger = tuned weights, and the loss has fallen on the way."""
    job = TuneJob(**(COMMON | fields))
    scope, optimizer = fresh(job)
    records: list[dict[str, Any]] = []
    run(job, scope, optimizer, Progress(), records.append)
    tuned = scope.snapshot()
    again, other = fresh(job)
    replay(job, again, other, records)
    assert compare(again, tuned) == (True, 0.0)
    assert all(len(r["g"]) == job.directions for r in records)
    early, late = (sum(r["loss"] for r in part) for part in (records[:20], records[-20:]))
    assert late < early
    base = fresh(job)[0].master["w"]
    assert torch.equal(tuned["w"][~MASK["w"]], base[~MASK["w"]])
    assert not torch.equal(tuned["w"], base)
    counted = [r["step"] for r in records if "changed" in r]
    assert counted == [1, 2, 4, 8, 16, 32, 64, 100, 128, 200]
    assert all(0 <= r["changed"] <= 1 for r in records if "changed" in r)
    if job.optimizer == "conservative":
        assert {r["accepted"] for r in records} == {True, False}
    else:
        assert not any("accepted" in r for r in records)


def test_replay_of_a_ledger_that_was_changed_differs() -> None:
    """One projected gradient that is off by 1e-3 shows."""
    job = TuneJob(**COMMON)
    scope, optimizer = fresh(job)
    records: list[dict[str, Any]] = []
    run(job, scope, optimizer, Progress(), records.append)
    records[99]["g"][0] += 1e-3
    again, other = fresh(job)
    replay(job, again, other, records)
    identical, difference = compare(again, scope.snapshot())
    assert not identical
    assert 0 < difference < 1e-3


@pytest.mark.parametrize("precision", ["fp32-master", "inplace"])
@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_resume_is_bit_identical(
    optimizer: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 33 with a checkpoint of step 20, a run ends with the bits of a whole one."""
    if (optimizer, precision) == ("adamw", "inplace"):
        pytest.skip("refused by the job spec")
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    job = TuneJob(**(COMMON | {"steps": 50, "optimizer": optimizer, "precision": precision}))
    whole, state = fresh(job)
    run(job, whole, state, Progress(), lambda _record: None)

    stored = runs.create(job, None)
    scope, state = fresh(job)

    def on_step(record: dict[str, Any]) -> None:
        stored.append_metrics(record)
        if record["step"] == 20:
            save_checkpoint(stored, job, scope, state, 20)
        if record["step"] == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, scope, state, Progress(), on_step)
    again, state = fresh(job)
    records, at = restore_run(stored, job, again, state)
    assert len(records) == 33
    assert at == (20 if optimizer == "adamw" else 33)
    run(job, again, state, Progress(step=at), lambda _record: None)
    assert compare(again, whole.snapshot()) == (True, 0.0)


def _gradients(count: int) -> list[tuple[Draw, float]]:
    values = torch.linspace(-2, 3, count).sin().tolist()
    return [(Draw("gaussian", 0, i + 1), v) for i, v in enumerate(values)]


def test_momentum_adamm_and_sign_follow_their_rules() -> None:
    """Against the formulas in float64, over 12 steps."""
    job = TuneJob(momentum=0.8, beta1=0.7, beta2=0.9)
    for kind in (Momentum, AdaMM, Sign):
        scope = TunedScope({"w": torch.ones(40)})
        optimizer = kind(job)
        x = torch.ones(40).double()
        m, v, largest = (torch.zeros(40).double() for _ in range(3))
        for draw, g in _gradients(12):
            d = g * scope.z("w", draw).double()
            if kind is Momentum:
                m = 0.8 * m + d
                x = x - 0.01 * m
            elif kind is AdaMM:
                m, v = 0.7 * m + 0.3 * d, 0.9 * v + 0.1 * d * d
                largest = torch.maximum(largest, v)
                x = x - 0.01 * m / (largest.sqrt() + 1e-8)
            else:
                x = x - 0.01 * d.sign()
            optimizer.update(scope, [draw], [g], 0.01)
        torch.testing.assert_close(scope.master["w"].double(), x, rtol=1e-5, atol=1e-6)
        assert all(t.dtype == torch.float32 for t in optimizer.state().values())


def test_conservative_never_raises_the_loss_of_its_batch() -> None:
    """Every batch is all rows here, so the loss at the base never rises."""
    job = TuneJob(steps=60, batch_size=24, lr=0.5, eps=1e-2, optimizer="conservative")
    scope, optimizer = fresh(job)
    records: list[dict[str, Any]] = []
    progress = Progress()
    run(job, scope, optimizer, progress, records.append)
    losses = [r["loss"] for r in records]
    assert all(b <= a + 1e-6 for a, b in zip(losses, losses[1:], strict=False))
    assert any(not r["accepted"] for r in records)
    assert progress.forward_passes == 60 * 4


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_schedules(schedule: str) -> None:
    """Warm-up reaches lr; then constant, or down to nearly nothing at the last step."""
    job = TuneJob(steps=110, warmup_steps=10, lr=1.0, schedule=schedule)
    rates = [learning_rate(job, step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10] == 1.0
    half = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}[schedule]
    assert rates[60] == pytest.approx(half)
    assert all(0 < b <= a for a, b in zip(rates[10:], rates[11:], strict=False))
    assert (rates[-1] < 0.02) == (schedule != "constant")


def test_adamw_is_torch_adamw() -> None:
    """The same path as torch.optim.AdamW on float32 weights, with and without weight decay."""
    job = TuneJob(optimizer="adamw", weight_decay=0.1, beta1=0.85, beta2=0.95)
    ours = TunedScope(start(torch.float32))
    theirs = {n: p.clone().requires_grad_() for n, p in start(torch.float32).items()}
    groups = [
        {"params": [theirs["w"]], "weight_decay": 0.1},
        {"params": [theirs["w.bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.02, betas=(0.85, 0.95), eps=1e-8)
    optimizer = AdamW(job)
    for step in range(1, 30):
        gradients = {n: (p.detach() * step).sin() for n, p in theirs.items()}
        for name, p in theirs.items():
            p.grad = gradients[name]
        reference.step()
        optimizer.step(ours, gradients, step, 0.02)
        for name, p in theirs.items():
            torch.testing.assert_close(ours.master[name], p.detach(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = families.save(families.build("llama"), tmp_path_factory.mktemp("tiny") / "llama")
    return load(ModelFields(model=str(folder), device="cpu", dtype="float32"))


@pytest.mark.real_loss
@pytest.mark.parametrize(
    ("text", "lr"), [("layer:2", 1e-2), ("channels:2:top10%", 1e-2), ("lora", 1e-2), ("prefix", 1)]
)
def test_adamw_lowers_the_loss_of_a_model(tiny: LoadedModel, text: str, lr: float) -> None:
    """True gradients, recomputed blocks: the same as without, and ten steps help."""
    data = load_task("reviews")
    examples = [encode(data.task, r, tiny.tokenizer, tiny.context) for r in data.train[:8]]
    selection = select(tiny, parse(text))
    scope = TunedScope(selection.parameters, selection.masks)
    forward = ReferenceForward(tiny)
    prepared = forward.prepare(examples)
    _, gradients = gradients_of(tiny, forward, [prepared], scope, len(examples))
    tensors = list(scope.parameters.values())
    for p in tensors:
        p.requires_grad_(True)
    plain = torch.autograd.grad(task_loss(forward.logits(prepared), prepared.scored), tensors)
    for p in tensors:
        p.requires_grad_(False)
    for (name, gradient), other in zip(gradients.items(), plain, strict=True):
        inside = scope.masks.get(name, torch.ones_like(other))
        torch.testing.assert_close(gradient, other * inside, rtol=1e-4, atol=1e-7)
    job = TuneJob(optimizer="adamw", scope=text, steps=10, batch_size=8, lr=lr)
    records: list[dict[str, Any]] = []
    train(job, tiny, forward, scope, AdamW(job), examples, Progress(), records.append)
    assert records[-1]["loss"] < records[0]["loss"] - 3e-4
    assert math.isfinite(records[-1]["gradient_norm"])
    assert records[-1]["g"] == []
    scope.close()
    selection.close()
    assert all("forward" not in vars(block) for block in tiny.decoder.blocks)
    assert not any(p.requires_grad or p.grad is not None for p in tiny.model.parameters())
