"""The bound between the two paths: rounding stays below it, wrong computations do not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit import families
from zo_core.jobs import ModelFields
from zo_core.models.load import LoadedModel, load
from zo_core.tasks.data import load_task
from zo_core.tasks.templates import Candidate, Example, encode
from zo_core.zo import forward as forward_module
from zo_core.zo.forward import FastForward
from zo_core.zo.path import choose_forward
from zo_core.zo.reference import Prepared
from zo_core.zo.rounding import _log_probabilities, distance, in_float32
from zo_core.zo.scope import scope_parameters

MARGIN = 0.75
"""Of the bound: what legal roundings may use of it."""


class Forgetful(FastForward):
    """Wrong on purpose: loses the first token of every prompt."""

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """Lay out what is left."""
        return super().prepare(
            [
                replace(
                    e,
                    candidates=tuple(Candidate(c.tokens[1:], c.start - 1) for c in e.candidates),
                )
                for e in examples
            ]
        )


class Displaced(FastForward):
    """Wrong on purpose: every token believes to be twice as far into the text."""

    def prepare(self, examples: Sequence[Example]) -> Prepared:
        """Lay out at wrong places."""
        prepared = super().prepare(examples)
        return replace(prepared, positions=prepared.positions * 2)


def build(family: str, folder: Path, dtype: str, seed: int = 0) -> LoadedModel:
    """A tiny random model whose blocks matter: their matrices are six times as large as usual."""
    model = families.build(family, seed=seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f".{families.LAYERS - 1}." in name or ".layers." in name or ".h." in name:
                weight.mul_(6.0 if weight.dim() == 2 else 1.0)
    model.to(torch.bfloat16)  # so that every dtype but float16 starts from the same values
    families.save(model, folder)
    return load(ModelFields(model=str(folder), dtype=dtype, device="cpu"))


@pytest.fixture(scope="module", params=families.CONFIGS)
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny random model of a family in bfloat16."""
    return build(request.param, tmp_path_factory.mktemp(request.param), "bfloat16")


@given(
    prompts=st.lists(
        st.lists(st.integers(2, families.VOCABULARY - 1), min_size=1, max_size=16),
        min_size=2,
        max_size=2,
    ),
    layer=st.integers(0, families.LAYERS - 1),
)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rounding_stays_below_the_bound(
    half: LoadedModel, prompts: list[list[int]], layer: int
) -> None:
    """Whatever the family, the texts and the tuned layer, with room to spare."""
    apart, bound = distance(half, FastForward(half, layer), [_example(p) for p in prompts])
    assert apart <= MARGIN * bound
    assert bound > 0


def test_a_lost_token_exceeds_the_bound(half: LoadedModel) -> None:
    """So the bound is not vacuous, on any family."""
    prompts = [[17, 923, 5001, 44, 12], [6001, 2, 88]]
    apart, bound = distance(half, Forgetful(half, 2), [_example(p) for p in prompts])
    assert apart > bound


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_on_the_bundled_model(dtype: str) -> None:
    """Real rows: the fast path is taken, a wrong one is not."""
    demo = load(ModelFields(device="cpu", dtype=dtype))
    data = load_task("reviews")
    rows = [encode(data.task, row, demo.tokenizer, demo.context) for row in data.train[:2]]
    apart, bound = distance(demo, FastForward(demo, 3), rows)
    assert apart <= MARGIN * bound
    for wrong in (Forgetful, Displaced):
        apart, bound = distance(demo, wrong(demo, 3), rows)
        assert apart > 1.5 * bound, wrong
    assert choose_forward(demo, "auto", 3, rows)[0].name == "fast"


def test_a_wrong_path_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason says by how much it was off."""
    demo = load(ModelFields(device="cpu", dtype="bfloat16"))
    monkeypatch.setattr("zo_core.zo.path.FastForward", Displaced)
    rows = [_example([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]) for _ in range(2)]
    forward, reason = choose_forward(demo, "auto", 3, rows)
    assert forward.name == "reference"
    assert "disagrees" in reason


def test_a_path_that_mixes_the_points_of_a_pair_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A single pass would not show it: each point is run beside one that is far away."""
    demo = load(ModelFields(device="cpu", dtype="float32"))
    rows = [_example([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]) for _ in range(2)]
    tuned = list(scope_parameters(demo, 3))
    assert choose_forward(demo, "auto", 3, rows, tuned=tuned)[0].name == "fast"
    right = forward_module.paired

    def wrong(model: Any, weights: Any, *rest: Any) -> Any:
        return right(model, {n: (w[0], w[0]) for n, w in weights.items()}, *rest)

    monkeypatch.setattr(forward_module, "paired", wrong)
    forward, reason = choose_forward(demo, "auto", 3, rows, tuned=tuned)
    assert forward.name == "reference"
    assert "disagrees" in reason


def test_widened_modules_compute_in_float32(tmp_path: Path) -> None:
    """As the same weights loaded in float32 do, and nothing is left behind."""
    loaded = build("qwen3", tmp_path, "bfloat16")
    wide = load(ModelFields(model=str(tmp_path), dtype="float32", device="cpu"))
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    rows = [_example([17, 923, 5001, 44, 12]), _example([6001, 2])]
    with in_float32(loaded.model):
        got = _log_probabilities(FastForward(loaded, 2), rows)
    torch.testing.assert_close(got, _log_probabilities(FastForward(wide, 2), rows))
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name]), name
    assert all("forward" not in vars(m) for m in loaded.model.modules())


def _example(prompt: list[int]) -> Example:
    answers = ([7], [9, 5])
    candidates = tuple(Candidate((*prompt, *a), len(prompt)) for a in answers)
    return Example(candidates=candidates, label=0, truncated=False)
