"""The fp8 suffix: mean and half difference of a pair, whatever the family, and back afterwards."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, Qwen3MoeConfig

from tests.unit import families
from zo_core.errors import UserError
from zo_core.jobs import ModelFields, TuneJob
from zo_core.models.load import LoadedModel, load
from zo_core.tasks.data import load_task
from zo_core.tasks.templates import Candidate, Example, encode
from zo_core.zo.forward import FastForward
from zo_core.zo.fp8 import PairsInFp8, rounded
from zo_core.zo.path import choose_forward, fp8_reason
from zo_core.zo.rounding import fp8_error
from zo_core.zo.scope import Draw, Point, TunedScope, scope_parameters

DRAWS = [Draw("gaussian", 0, step) for step in range(1, 9)]


class Headless(nn.Module):
    """A model of one block and nothing else."""

    def __init__(self, block: nn.Module) -> None:
        """Hold it."""
        super().__init__()
        self.block = block

    def get_output_embeddings(self) -> None:
        """There is none."""


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, relative to what is wanted."""
    return float((got - wanted).norm() / wanted.norm())


@given(
    tokens=st.integers(1, 40),
    apart=st.floats(1e-6, 1.0),
    scale=st.floats(1e-4, 1e4),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40)
def test_the_difference_keeps_its_own_precision(
    tokens: int, apart: float, scale: float, seed: int
) -> None:
    """However close the points: mean and difference of a product are right to some percent each.

    Rounding the points one by one, as fp8 inference does, loses a difference this small.
    """
    torch.manual_seed(seed)
    block = nn.Module()
    block.product = nn.Linear(64, 48, bias=False)  # type: ignore[assignment]
    middle, step = torch.randn(tokens, 64) * scale, torch.randn(tokens, 64) * scale * apart
    pair = torch.cat((middle + step, middle - step))
    eight = PairsInFp8(Headless(block), [block], [block], compiled=False)
    assert len(eight) == 1
    with torch.no_grad(), eight.running():
        got = block.product(pair[None])[0].double()
    plus, minus = got.chunk(2)
    right_plus, right_minus = (pair.double() @ block.product.weight.detach().double().T).chunk(2)
    assert error(plus + minus, right_plus + right_minus) < 0.1
    float32 = 2**-20 / apart  # what the sums lose when the two are put together again
    assert error(plus - minus, right_plus - right_minus) < 0.1 + float32


def test_rounding_the_points_apart_loses_their_difference() -> None:
    """The contrast, without which the test above would say nothing."""
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    middle, step = torch.randn(20, 64), 1e-3 * torch.randn(20, 64)

    def product(x: torch.Tensor) -> torch.Tensor:
        (rows, scale), (weights, scales) = rounded(x), rounded(weight)
        return (rows.float() * scale) @ (weights.float() * scales).T

    apart = product(middle + step) - product(middle - step)
    assert error(apart, 2 * step @ weight.T) > 1.0


@pytest.fixture(scope="module")
def half() -> LoadedModel:
    """The bundled model in bfloat16 on the CPU."""
    return load(ModelFields(device="cpu", dtype="bfloat16"))


FAMILIES = {
    **{n: families.CONFIGS[n] for n in ("llama", "qwen3", "gemma2", "phi", "gpt_neox", "opt")},
    "opt*": OPTConfig(
        **families._COMMON,
        hidden_size=32,
        num_hidden_layers=families.LAYERS,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **families._SIZES,
        **families._GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_comes_back_as_it_was(
    name: str, dtype: str, layer: int, tmp_path: Path
) -> None:
    """The pair's losses stay near the model's own; no class, buffer or forward is left behind.

    In bfloat16 float32 states meet weights of the other dtype wherever one is forgotten.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(FAMILIES[name])).eval()
    families.save(model, tmp_path)
    loaded = load(ModelFields(model=str(tmp_path), dtype=dtype, device="cpu"))
    before = {n: type(m) for n, m in loaded.model.named_modules()}
    buffers = {n: b.shape for n, b in loaded.model.named_buffers()}
    parameters = dict(loaded.model.named_parameters())
    batch = [
        Example(
            candidates=tuple(Candidate((5, 6, n, 8, a), 4) for a in (7, 9)),
            label=0,
            truncated=False,
        )
        for n in (11, 12, 13)
    ]
    plain, eight = FastForward(loaded, layer), FastForward(loaded, layer, fp8=True)
    assert eight.fp8
    points = (Point(DRAWS[0], 1e-2), Point(DRAWS[0], -1e-2))
    scope = TunedScope(scope_parameters(loaded, layer))
    try:
        alone = plain.logits(plain.prepare(batch))
        wanted = plain.logits_at(plain.prepare(batch), scope, points)
        got = eight.logits_at(eight.prepare(batch), scope, points)
        assert torch.equal(eight.logits(eight.prepare(batch)), alone)
    finally:
        scope.close()
    assert not torch.equal(got[0], wanted[0])
    for ours, theirs in zip(got, wanted, strict=True):
        assert error(ours.float(), theirs.float()) < 0.2
    assert {n: type(m) for n, m in loaded.model.named_modules()} == before
    assert not any("forward" in vars(m) for m in loaded.model.modules())
    assert {n: b.shape for n, b in loaded.model.named_buffers()} == buffers
    assert all(p is parameters[n] for n, p in loaded.model.named_parameters())


def test_an_error_on_the_way_leaves_nothing_behind(half: LoadedModel) -> None:
    """A block that breaks: classes, parameters and forwards are the model's own again."""
    forward = FastForward(half, 3, fp8=True)
    before = {n: type(m) for n, m in half.model.named_modules()}
    rows = [Example((Candidate((5, 6, 7), 2), Candidate((5, 6, 8), 2)), 0, False)]
    scope = TunedScope(scope_parameters(half, 3))
    points = (Point(DRAWS[0], 1e-3), Point(DRAWS[0], -1e-3))

    def broken(*_args: object) -> None:
        raise ArithmeticError

    hook = half.decoder.blocks[9].register_forward_pre_hook(broken)
    try:
        with pytest.raises(ArithmeticError):
            forward.logits_at(forward.prepare(rows), scope, points)
    finally:
        hook.remove()
        scope.close()
    assert {n: type(m) for n, m in half.model.named_modules()} == before
    assert not any("forward" in vars(m) for m in half.model.modules())
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_experts_stay_as_they_are() -> None:
    """A layer in a list sees the tokens that are sent to it: no pair to split."""
    block = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))  # type: ignore[assignment]
    block.shared = nn.Linear(16, 16)  # type: ignore[assignment]
    block.gate = nn.Linear(16, 4)  # type: ignore[assignment]
    assert len(PairsInFp8(Headless(block), [block], [block], compiled=False)) == 1


def test_the_gradient_is_as_good_as_bfloat16(half: LoadedModel) -> None:
    """Against float32, over eight draws at the first outlier layer: better, in fact.

    The residual stream, norms and logits are float32 in the suffix, and bfloat16 in the model.
    """
    data = load_task("reviews")
    rows = [encode(data.task, row, half.tokenizer, half.context) for row in data.train[:8]]
    scope = TunedScope(scope_parameters(half, 3))
    before = {n: p.clone() for n, p in scope.parameters.items()}
    forward = FastForward(half, 3, fp8=True)
    try:
        own, eight = fp8_error(half, forward, scope, rows, DRAWS, 1e-3)
        assert all(torch.equal(p, before[n]) for n, p in scope.parameters.items())
    finally:
        scope.close()
    assert own > 0.1
    assert 0 < eight < own


def test_refused_where_it_cannot_be(half: LoadedModel) -> None:
    """On a CPU, in one sentence, before the run's first step."""
    with pytest.raises(
        UserError, match=r"suffix: fp8 needs an NVIDIA GPU .* leave suffix at model"
    ):
        choose_forward(half, "auto", 3, [], suffix="fp8")


@pytest.mark.parametrize(
    ("own", "eight", "refused"), [(0.3, 0.9, False), (0.3, 1.1, True), (1.2, 1.1, False)]
)
def test_refused_where_rounding_is_larger_than_the_gradient(
    half: LoadedModel, monkeypatch: pytest.MonkeyPatch, own: float, eight: float, refused: bool
) -> None:
    """The sentence has both errors; a model whose own rounding is larger still may go on."""
    monkeypatch.setattr("zo_core.zo.path.fp8_error", lambda *_args: (own, eight))
    scope = TunedScope(scope_parameters(half, 3))
    forward = FastForward(half, 3, fp8=True)
    try:
        if refused:
            with pytest.raises(UserError, match=r"suffix: fp8 is too coarse .*110% .*30%"):
                fp8_reason(TuneJob(suffix="fp8"), half, forward, scope, [])
        else:
            assert f"bfloat16 {own:.0%}" in fp8_reason(
                TuneJob(suffix="fp8"), half, forward, scope, []
            )
    finally:
        scope.close()


def test_refused_where_points_run_one_by_one(half: LoadedModel) -> None:
    """More than a quarter of the model tuned."""
    scope = TunedScope(scope_parameters(half, None))
    job = TuneJob().model_copy(update={"scope": "full", "suffix": "fp8"})
    forward = FastForward(half, 0, fp8=True)
    try:
        with pytest.raises(UserError, match=r"the points of full run one by one"):
            fp8_reason(job, half, forward, scope, [])
    finally:
        scope.close()


def test_refused_where_the_first_pair_shows_that_there_is_none(
    half: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuned module that does not treat tokens alike: both errors would be the model's own."""
    scope = TunedScope(scope_parameters(half, 3))
    forward = FastForward(half, 3, fp8=True)

    def one_by_one(*_args: object) -> tuple[float, float]:
        forward._tokenwise = False
        return 0.02, 0.02

    monkeypatch.setattr("zo_core.zo.path.fp8_error", one_by_one)
    try:
        with pytest.raises(UserError, match=r"points of layer:auto run one by one on this model"):
            fp8_reason(TuneJob(suffix="fp8"), half, forward, scope, [])
    finally:
        scope.close()


def test_a_gradient_of_zero_cannot_be_judged(half: LoadedModel) -> None:
    """An eps that no bfloat16 weight feels."""
    rows = [Example((Candidate((5, 6, 7), 2), Candidate((5, 6, 8), 2)), 0, False)]
    scope = TunedScope(scope_parameters(half, 13))
    forward = FastForward(half, 13, fp8=True)
    try:
        with pytest.raises(UserError, match=r"no loss moves at eps 1e-30: raise eps"):
            fp8_error(half, forward, scope, rows, DRAWS[:2], 1e-30)
    finally:
        scope.close()


def test_too_little_memory_to_judge(half: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, and says so."""

    def full(*_args: object) -> tuple[float, float]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("zo_core.zo.path.fp8_error", full)
    scope = TunedScope(scope_parameters(half, 3))
    forward = FastForward(half, 3, fp8=True)
    try:
        reason = fp8_reason(TuneJob(suffix="fp8"), half, forward, scope, [])
    finally:
        scope.close()
    assert "memory is too short" in reason
