"""The estimator: unbiased and of the right size on a quadratic, and the published arithmetic."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.unit import families
from zo_core.jobs import ModelFields, TuneJob
from zo_core.models.load import LoadedModel, load
from zo_core.scope_spec import parse
from zo_core.tasks.data import load_task
from zo_core.tasks.templates import Example, encode
from zo_core.zo import estimator
from zo_core.zo.estimator import estimate, points
from zo_core.zo.inplace import InplaceScope
from zo_core.zo.optimizers import ZoSgd
from zo_core.zo.reference import ReferenceForward
from zo_core.zo.scope import BASE, NO_DECAY, Draw, Point, TunedScope
from zo_core.zo.scopes import select
from zo_core.zo.trainer import make_scope

SIZE, DRAWS, EPS = 8, 1200, 0.1


class Quadratic:
    """L(x) = a . (x + shift) + |x + shift|^2 / 2 in float64, in place of a model."""

    name = "quadratic"

    def __init__(self) -> None:
        """Fixed coefficients."""
        self.a = torch.linspace(2, -1, SIZE).double()
        self.shift = torch.linspace(-1, 1, SIZE).double()
        self.passes = 0

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """L at an offset from the base."""
        y = x.double() + self.shift
        return self.a @ y + (y @ y) / 2

    def prepare(self, examples: Sequence[Any]) -> Any:
        """Only the number of rows counts."""
        return SimpleNamespace(scored=SimpleNamespace(label=torch.zeros(len(examples))))

    def logits_at(self, prepared: Any, scope: TunedScope, where: Sequence[Point]) -> torch.Tensor:
        """The loss at every point."""
        self.passes += len(where)
        return torch.stack([self.loss(self._double(scope, point)) for point in where])

    @staticmethod
    def _double(scope: TunedScope, point: Point) -> torch.Tensor:
        """The point in float64: the statistics are not about float32."""
        x = scope.master["x"].double()
        if point.draw is not None:
            x = x + point.scale * scope.z("x", point.draw).double()
        return x


@pytest.fixture
def quadratic(monkeypatch: pytest.MonkeyPatch) -> Quadratic:
    monkeypatch.setattr(estimator, "task_loss", lambda logits, scored: logits)  # noqa: ARG005
    return Quadratic()


@pytest.mark.parametrize("sides", ["two-sided", "one-sided"])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "sphere"])
def test_unbiased_and_of_the_right_size(quadratic: Quadratic, noise: str, sides: str) -> None:
    """E[g z] is the gradient; E|g z|^2 is (d + 2) |grad|^2 for gaussian z, d |grad|^2 for the rest.

    Both estimates have no bias on this quadratic at any eps (odd moments of z vanish). The second
    moment is that of the two-sided one, whose g is z . grad exactly. Every mean of 1200 draws lies
    within 5 standard errors: a false alarm in fewer than one of 10^4 runs of all six cases.
    """
    gradient = quadratic.a + quadratic.shift
    scope = TunedScope({"x": torch.zeros(SIZE)})
    batch = [quadratic.prepare([0, 0])]
    estimates = []
    for step in range(1, DRAWS + 1):
        draw = Draw(noise, 7, step)
        found = estimate(quadratic, batch, scope, [draw], EPS, sides)
        estimates.append(found.g[0] * scope.z("x", draw).double())
    table = torch.stack(estimates)
    error = (table.mean(0) - gradient).abs()
    assert bool((error < 5 * table.std(0) / math.sqrt(DRAWS)).all())
    if sides == "two-sided":
        squares = table.square().sum(1)
        factor = SIZE + 2 if noise == "gaussian" else SIZE
        wanted = factor * float(gradient @ gradient)
        slack = 5 * float(squares.std()) / math.sqrt(DRAWS) + 1e-9
        assert abs(float(squares.mean()) - wanted) < slack


def test_directions_average_and_share_the_base_loss(quadratic: Quadratic) -> None:
    """Q directions divide the excess of E|d|^2 over |grad|^2 by q; q + 1 or 2 q passes."""
    gradient = quadratic.a + quadratic.shift
    norm = float(gradient @ gradient)
    scope = TunedScope({"x": torch.zeros(SIZE)})
    batch = [quadratic.prepare([0])]
    means = {}
    for q in (1, 4):
        squares = []
        for step in range(1, 301):
            draws = [Draw("gaussian", 3, step, i) for i in range(q)]
            found = estimate(quadratic, batch, scope, draws, EPS)
            d = sum(g * scope.z("x", w).double() for g, w in zip(found.g, draws, strict=True)) / q
            squares.append(float(d.square().sum()))
        means[q] = torch.tensor(squares).double()
        slack = 5 * float(means[q].std()) / math.sqrt(300)
        assert abs(float(means[q].mean()) - norm - norm * (SIZE + 1) / q) < slack
    draws = [Draw("gaussian", 3, 1, i) for i in range(4)]
    for sides, passes in (("two-sided", 8), ("one-sided", 5)):
        quadratic.passes = 0
        found = estimate(quadratic, batch, scope, draws, EPS, sides)
        assert quadratic.passes == len(found.losses) == passes
    assert points(draws[:1], EPS, "one-sided") == [BASE, Point(draws[0], EPS)]
    assert points(draws[:1], EPS, "two-sided", with_base=True)[0] == BASE


def test_micro_batches_are_weighted_by_their_rows(
    tiny: LoadedModel, tiny_examples: list[Example]
) -> None:
    """The loss of 5 rows is that of micro-batches of 2, 2 and 1."""
    forward = ReferenceForward(tiny)
    scope = make_scope(TuneJob(), select(tiny, parse("layer:2")))
    draw = Draw("gaussian", 0, 1)
    whole = estimate(forward, [forward.prepare(tiny_examples[:5])], scope, [draw], 1e-2)
    parts = [forward.prepare(tiny_examples[i : min(i + 2, 5)]) for i in (0, 2, 4)]
    split = estimate(forward, parts, scope, [draw], 1e-2)
    assert split.plus == pytest.approx(whole.plus, abs=1e-6)
    assert split.g == pytest.approx(whole.g, abs=1e-4)
    scope.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_examples(tiny: LoadedModel) -> list[Example]:
    return encoded(tiny)


def tiny_model(family: str, folder: Path) -> LoadedModel:
    path = families.save(families.build(family), folder / family)
    return load(ModelFields(model=str(path), device="cpu", dtype="float32"))


def encoded(loaded: LoadedModel) -> list[Example]:
    data = load_task("reviews")
    return [encode(data.task, r, loaded.tokenizer, loaded.context) for r in data.train[:6]]


@torch.no_grad()
def published_loss(loaded: LoadedModel, examples: Sequence[Example]) -> float:
    """MeZO's classification loss, written out: one candidate at a time, no padding."""
    losses = []
    for example in examples:
        scores = []
        for candidate in example.candidates:
            logits = loaded.model(input_ids=torch.tensor([candidate.tokens])).logits[0].float()
            places = range(candidate.start, len(candidate.tokens))
            terms = [F.log_softmax(logits[i - 1], -1)[candidate.tokens[i]] for i in places]
            scores.append(torch.stack(terms).mean())
        losses.append(F.cross_entropy(torch.stack(scores)[None], torch.tensor([example.label])))
    return float(torch.stack(losses).double().mean())


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2"])
def test_one_step_is_the_published_step(family: str, tmp_path: Path) -> None:
    """Given (seed, z), one reference step of the full scope is MeZO's, to fp32 rounding."""
    loaded = tiny_model(family, tmp_path)
    examples = encoded(loaded)
    eps, lr, decay = 1e-2, 1e-2, 0.1
    scope = make_scope(TuneJob(), select(loaded, parse("full")))
    draw = Draw("gaussian", 5, 3)
    names = dict(loaded.model.named_parameters())
    z = {n: scope.z(n, draw).clone() for n in names}
    start = {n: p.clone() for n, p in names.items()}
    pair = []
    for sign in (1, -2):
        for n, p in names.items():
            p += sign * eps * z[n]
        pair.append(published_loss(loaded, examples))
    g = (pair[0] - pair[1]) / (2 * eps)
    expected = {}
    for n, p in start.items():
        wd = 0.0 if NO_DECAY.search(n) else decay
        expected[n] = p - lr * (g * z[n] + wd * p)
        names[n].copy_(p)

    forward = ReferenceForward(loaded)
    found = estimate(forward, [forward.prepare(examples)], scope, [draw], eps)
    # Losses agree to a few float32 roundings, which 1 / (2 eps) amplifies in g.
    assert [found.plus[0], found.minus[0]] == pytest.approx(pair, abs=3e-6)
    assert found.g[0] == pytest.approx(g, abs=3e-6 / eps)
    ZoSgd(TuneJob(weight_decay=decay)).update(scope, [draw], [g], lr)
    for n, p in names.items():
        torch.testing.assert_close(p, expected[n], rtol=1e-6, atol=1e-6)
    scope.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inplace_is_the_published_rounding(dtype: torch.dtype) -> None:
    """+eps, -2 eps, +eps and the update in the working dtype: the same bits as MeZO's lines."""
    torch.manual_seed(0)
    eps, lr, decay, g = 1e-3, 1e-2, 0.1, 3.7
    start = {"w": torch.randn(64, 33).to(dtype), "w.bias": torch.randn(64).to(dtype)}
    scope = InplaceScope({n: p.clone() for n, p in start.items()})
    draw = Draw("gaussian", 0, 1)
    expected = {}
    for name, p in start.items():
        z = scope.z(name, draw).to(dtype)
        for scaling in (1, -2, 1):
            p = p + scaling * z * eps
        wd = 0.0 if "bias" in name else decay
        expected[name] = p - lr * (g * z + wd * p) if wd else p - lr * (g * z)
    for point in points([draw], eps, "two-sided"):
        scope.perturb(point)
        assert not scope.settled
    ZoSgd(TuneJob(weight_decay=decay)).update(scope, [draw], [g], lr)
    assert scope.settled
    for name in start:
        assert torch.equal(scope.parameters[name], expected[name]), name
    scope.close()
    assert all(torch.equal(scope.parameters[n], start[n]) for n in start)


def test_inplace_drifts_where_the_master_does_not() -> None:
    """100 perturbations and restores in bfloat16: the published way drifts, the master does not."""
    torch.manual_seed(0)
    start = torch.randn(10_000).to(torch.bfloat16)
    drift = {}
    for kind in (TunedScope, InplaceScope):
        scope = kind({"w": start.clone()})
        for step in range(1, 101):
            for point in points([Draw("gaussian", 0, step)], 1e-3, "two-sided"):
                scope.perturb(point)
            scope.restore()
        drift[kind] = float((scope.parameters["w"].float() - start.float()).norm())
        drift[kind] /= float(start.float().norm())
    assert drift[TunedScope] == 0.0
    assert 0.01 < drift[InplaceScope] < 0.2
