"""The ZO core: exact restore, the estimator, replay, and fast path = reference path."""

import math

import pytest
import torch

from zo_core.errors import UserError
from zo_core.jobs import ModelFields, TuneJob
from zo_core.models.load import LoadedModel, load
from zo_core.tasks.scoring import candidate_scores, task_loss
from zo_core.tasks.templates import Example
from zo_core.zo.estimator import estimate
from zo_core.zo.forward import FastForward
from zo_core.zo.optimizers import ZoSgd
from zo_core.zo.reference import ReferenceForward
from zo_core.zo.scope import Draw, Point, TunedScope, scope_parameters
from zo_core.zo.trainer import (
    LossNotFiniteError,
    Progress,
    batch_indices,
    replay,
    train,
)

DRAW = Draw("gaussian", seed=0, step=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layer", [None, 3])
def test_restore_is_exact(demo: LoadedModel, dtype: str, layer: int | None) -> None:
    """After both perturbations and an update with lr 0, every weight has its old bits."""
    loaded = load(ModelFields(device=demo.device.type, dtype=dtype))
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    scope = TunedScope(scope_parameters(loaded, layer))
    scope.perturb(Point(DRAW, 1e-3))
    changed = {n for n, p in loaded.model.named_parameters() if not torch.equal(p, before[n])}
    # In bf16 and fp16 an eps this small may round away on every entry of a norm.
    matrices = {n for n, p in scope.parameters.items() if p.dim() == 2}
    assert matrices <= changed <= set(scope.parameters)
    scope.perturb(Point(DRAW, -1e-3))
    ZoSgd(TuneJob()).update(scope, [DRAW], [123.0], lr=0.0)
    assert all(torch.equal(p, before[n]) for n, p in loaded.model.named_parameters())


def test_close_gives_the_model_back(demo: LoadedModel) -> None:
    """Whatever was tuned, the resident model is pristine afterwards."""
    before = {n: p.clone() for n, p in demo.model.named_parameters()}
    scope = TunedScope(scope_parameters(demo, 3))
    ZoSgd(TuneJob()).update(scope, [DRAW], [10.0], lr=1e-2)
    scope.close()
    assert all(torch.equal(p, before[n]) for n, p in demo.model.named_parameters())


def test_z_is_shared_between_scopes(demo: LoadedModel) -> None:
    """A single-layer run and a full-model run see the same z on the shared parameters."""
    layer = TunedScope(scope_parameters(demo, 5))
    full = TunedScope(scope_parameters(demo, None))
    for name in layer.parameters:
        assert torch.equal(layer.z(name, DRAW), full.z(name, DRAW))


def test_step_equals_the_published_arithmetic(
    demo: LoadedModel, review_examples: list[Example]
) -> None:
    """One step, written out as Algorithm 1 of MeZO with the same z, to float32 rounding."""
    forward, examples, eps, lr = ReferenceForward(demo), review_examples[:4], 1e-3, 1e-3
    prepared = forward.prepare(examples)
    names = scope_parameters(demo, 3)
    start = {n: p.clone() for n, p in names.items()}
    scope = TunedScope(names)
    z = {n: scope.z(n, DRAW).clone() for n in names}

    def loss() -> float:
        return float(task_loss(forward.logits(prepared), prepared.scored))

    for name, p in names.items():
        p += eps * z[name]
    plus = loss()
    for name, p in names.items():
        p -= 2 * eps * z[name]
    minus = loss()
    for name, p in names.items():
        p += eps * z[name]
    g = (plus - minus) / (2 * eps)
    expected = {n: p - lr * g * z[n] for n, p in names.items()}
    for name, p in names.items():
        p.copy_(start[name])

    (ours,) = estimate(forward, [prepared], scope, [DRAW], eps).g
    ZoSgd(TuneJob()).update(scope, [DRAW], [ours], lr)
    assert ours == pytest.approx(g, rel=2e-2)  # the in-place sum of the oracle drifts by roundings
    for name, p in names.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-5)
    scope.close()


@pytest.mark.parametrize("layer", [0, 1, 3, 15])
def test_fast_path_equals_reference(
    demo: LoadedModel, review_examples: list[Example], layer: int
) -> None:
    """Scores of a perturbed model agree to 1e-5, cached or not, in any batch."""
    reference = ReferenceForward(demo)
    cached, uncached = FastForward(demo, layer), FastForward(demo, layer, budget=0)
    for forward in (cached, uncached):
        forward.register(review_examples)
    scope = TunedScope(scope_parameters(demo, layer))
    for batch in (review_examples[:1], review_examples[3:19], review_examples[30:33]):
        oracle = reference.prepare(batch)
        scope.perturb(Point(DRAW, 1e-2))
        wanted = candidate_scores(reference.logits(oracle), oracle.scored)
        scope.restore()
        for forward in (cached, uncached):
            prepared = forward.prepare(batch)  # with the base weights, as the trainer does
            scope.perturb(Point(DRAW, 1e-2))
            got = candidate_scores(forward.logits(prepared), prepared.scored)
            scope.restore()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    scope.close()


def test_blocks_are_whole_after_a_fast_forward(
    demo: LoadedModel, review_examples: list[Example]
) -> None:
    """The skipped blocks work again, also after an error inside the forward pass."""
    forward = FastForward(demo, 4)
    prepared = forward.prepare(review_examples[:2])
    broken = demo.decoder.blocks[6].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward.logits(prepared)
    broken.remove()
    assert all("forward" not in vars(block) for block in demo.decoder.blocks)
    assert not demo.decoder.blocks[4]._forward_pre_hooks


def test_estimator_is_unbiased_on_a_quadratic() -> None:
    """E[g z] = gradient of a quadratic, where the two-sided estimate has no bias at any eps.

    With L = a . x + |x|^2 / 2 and n draws, each coordinate of the mean of g z lies within 5
    standard errors of the gradient: a false alarm in fewer than one of 10^5 tests.
    """
    size, draws, eps = 8, 4000, 0.1
    x, a = torch.linspace(-1, 1, size).double(), torch.linspace(2, -1, size).double()
    estimates = []
    for step in range(1, draws + 1):
        scope = TunedScope({"x": torch.zeros(size)})
        z = scope.z("x", Draw("gaussian", 7, step)).double()
        plus, minus = ((a @ y) + (y @ y) / 2 for y in (x + eps * z, x - eps * z))
        estimates.append((plus - minus) / (2 * eps) * z)
    table = torch.stack(estimates)
    error = (table.mean(0) - (a + x)).abs()
    assert bool((error < 5 * table.std(0) / math.sqrt(draws)).all())


def test_batches_are_a_function_of_seed_and_step() -> None:
    """Every epoch is a permutation, and seeds differ."""
    epoch = [i for step in range(1, 6) for i in batch_indices(0, step, 20, 4)]
    assert sorted(epoch) == list(range(20))
    assert batch_indices(0, 6, 20, 4) != batch_indices(0, 1, 20, 4)
    assert batch_indices(0, 3, 20, 4) == batch_indices(0, 3, 20, 4)
    assert batch_indices(1, 1, 20, 4) != batch_indices(0, 1, 20, 4)
    assert sorted(batch_indices(0, 1, 3, 16)) == [0, 1, 2]


def _train(demo: LoadedModel, examples: list[Example], job: TuneJob) -> tuple[TunedScope, list]:
    scope = TunedScope(scope_parameters(demo, 3))
    forward = FastForward(demo, 3)
    forward.register(examples)
    records: list = []
    train(job, demo, forward, scope, ZoSgd(job), examples, Progress(), records.append)
    return scope, records


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_replay_rebuilds_the_bits(
    demo: LoadedModel, review_examples: list[Example], noise: str
) -> None:
    """Base weights + ledger = tuned weights, bit for bit, with weight decay."""
    job = TuneJob(steps=12, batch_size=4, noise=noise, weight_decay=0.1, lr=1e-2)
    scope, records = _train(demo, review_examples, job)
    tuned = {n: m.clone() for n, m in scope.master.items()}
    scope.close()
    again = TunedScope(scope_parameters(demo, 3))
    replay(job, again, ZoSgd(job), records)
    assert all(torch.equal(again.master[n], tuned[n]) for n in tuned)
    assert any(not torch.equal(tuned[n], scope._base[n]) for n in tuned)
    again.close()


def test_not_finite_stops_at_the_step_before(
    demo: LoadedModel, review_examples: list[Example]
) -> None:
    """A diverging run says at which step, and keeps finite weights."""
    job = TuneJob(steps=200, batch_size=4, lr=1e3, eps=1e-2)
    scope = TunedScope(scope_parameters(demo, 3))
    progress, records = Progress(), []
    poison = FastForward(demo, 3)

    def on_step(record: dict) -> None:
        records.append(record)
        if record["step"] == 3:  # a weight overflows: the next loss cannot be finite
            next(iter(demo.model.parameters()))[:] = float("nan")

    embedding = next(iter(demo.model.parameters())).clone()
    try:
        with pytest.raises(LossNotFiniteError, match="step 4 .*up to step 3"):
            train(job, demo, poison, scope, ZoSgd(job), review_examples, progress, on_step)
    finally:
        next(iter(demo.model.parameters())).copy_(embedding)
    assert progress.step == len(records) == 3
    assert all(torch.isfinite(m).all() for m in scope.master.values())
    scope.close()


def test_layer_out_of_range_names_the_range(demo: LoadedModel) -> None:
    """The sentence says which layers there are."""
    with pytest.raises(UserError, match="layers 0 to 15"):
        scope_parameters(demo, 16)
