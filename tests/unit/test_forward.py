"""The fast path against the reference path: families, lengths, candidates, points, layers."""

from itertools import pairwise
from pathlib import Path
from shutil import which

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    DiffLlamaConfig,
    Gemma2Config,
    Glm4MoeConfig,
    JetMoeConfig,
    MistralConfig,
    Qwen3MoeConfig,
)

from tests.unit import families
from tests.unit.planted import in_memory
from zo_core.jobs import ModelFields
from zo_core.models.load import LoadedModel, load
from zo_core.tasks.scoring import candidate_scores, task_loss
from zo_core.tasks.templates import Candidate, Example
from zo_core.zo import attention
from zo_core.zo.forward import FastForward
from zo_core.zo.graphs import GraphedForward, Row, StaticPacking
from zo_core.zo.packing import Packing, pack
from zo_core.zo.paired import NotTokenwiseError, token_axis
from zo_core.zo.path import choose_forward
from zo_core.zo.reference import ReferenceForward
from zo_core.zo.scope import Draw, Point, TunedScope, scope_parameters

DRAW = Draw("gaussian", seed=3, step=5)
POINTS = (Point(DRAW, 1e-2), Point(DRAW, -1e-2))
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOWED: dict[str, AutoConfig] = {
    "mistral": MistralConfig(**families._SIZES, num_key_value_heads=2, sliding_window=4),
    "gemma2": Gemma2Config(
        **families._SIZES, **families._GROUPED, query_pre_attn_scalar=8, sliding_window=4
    ),
    "qwen3_moe": Qwen3MoeConfig(**families._SIZES, **families._GROUPED, **MOE),
    # Its router gives [T, experts] for [1, T, H].
    "glm4_moe": Glm4MoeConfig(
        **families._SIZES,
        **families._GROUPED,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
    ),
    # It multiplies with weights of modules that it does not call.
    "jetmoe": JetMoeConfig(
        **{k: v for k, v in families._SIZES.items() if k != "num_attention_heads"},
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    # Its blocks call attention twice.
    "diffllama": DiffLlamaConfig(**families._SIZES, num_key_value_heads=2),
}


@pytest.fixture(scope="module", params=[*families.CONFIGS, *(f"{name}*" for name in WINDOWED)])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny random model of a family; with a star, one with something particular."""
    name: str = request.param
    folder: Path = tmp_path_factory.mktemp(name.strip("*"))
    if name.endswith("*"):
        before = families.CONFIGS.get(name[:-1])
        families.CONFIGS[name[:-1]] = WINDOWED[name[:-1]]
        try:
            model = families.build(name[:-1])
        finally:
            if before is None:
                del families.CONFIGS[name[:-1]]
            else:
                families.CONFIGS[name[:-1]] = before
    else:
        model = families.build(name)
    families.save(model, folder)
    return load(ModelFields(model=str(folder), dtype="float32", device="cpu"))


def example(prompt: list[int], *answers: list[int]) -> Example:
    """An example whose candidates follow one prompt."""
    return Example(
        candidates=tuple(Candidate((*prompt, *a), len(prompt)) for a in answers),
        label=0,
        truncated=False,
    )


SINGLE = [example([5], [7], [9]), example([4, 8, 15, 16, 23, 42, 11], [7], [9])]
SEVERAL = [
    example([5, 6, 7, 8, 9], [10, 11, 12], [10, 13], [14]),
    example([3], [4, 4], [5, 6, 7, 8, 9, 10], [4]),
]
TEMPLATE = [
    example([1, 2, 3, 4], [5, 6], [7, 8, 9]),
    example([1, 2, 3], [4], [5]),
    example([1, 2], [3, 10, 11], [12]),
    example([1, 2, 3, 13, 14, 15], [5, 6, 7], [5, 8]),
]
"""All begin alike, and one has nothing else."""


@pytest.mark.parametrize("layer", [0, 2, families.LAYERS - 1])
@pytest.mark.parametrize(
    "batch",
    [SINGLE, SEVERAL, SEVERAL[:1], TEMPLATE, TEMPLATE[1:2] * 2],
    ids=["one", "several", "lone", "template", "twice"],
)
def test_fast_equals_reference(tiny: LoadedModel, layer: int, batch: list[Example]) -> None:
    """Losses of a pair agree to 1e-5 and logits to 1e-4, cached or not."""
    reference, fast = ReferenceForward(tiny), FastForward(tiny, layer)
    fast.register(batch)
    scope = TunedScope(scope_parameters(tiny, layer))
    try:
        oracle, prepared = reference.prepare(batch), fast.prepare(batch)
        pair = fast.logits_at(prepared, scope, POINTS)
        for point, got, wanted in zip(
            POINTS, pair, reference.logits_at(oracle, scope, POINTS), strict=True
        ):
            scores = [
                candidate_scores(got, prepared.scored),
                candidate_scores(wanted, oracle.scored),
            ]
            torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-4)
            losses = [task_loss(got, prepared.scored), task_loss(wanted, oracle.scored)]
            torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5, msg=f"{point}")
    finally:
        scope.close()


def _listed() -> Packing:
    """The packing in progress; of tensors, as the kernel on a GPU reads them, the lists."""
    found = attention._packing
    if isinstance(found, Packing):
        return found
    assert isinstance(found, StaticPacking)
    queries, keys = found.query_borders.tolist(), found.key_borders.tolist()
    read = found.key_index.tolist() if found.shared else list(range(keys[-1]))
    seen = []
    for (start, end), (first, last) in zip(pairwise(queries), pairwise(keys), strict=True):
        # What fills a bucket up may lack keys, for which the kernel gives 0; nobody reads it.
        seen.append(tuple(read[first:last] if last - first >= end - start else range(start, end)))
    lengths = tuple(b - a for a, b in pairwise(queries))
    return Packing(found.query_borders.device, lengths, tuple(seen))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("batch", [SINGLE, SEVERAL, TEMPLATE], ids=["one", "several", "template"])
def test_buckets_and_whole_blocks_change_nothing(
    tiny: LoadedModel, batch: list[Example], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs, launch by launch: rounded sizes, tuned blocks once for each point."""
    monkeypatch.setattr(attention, "current", _listed)
    monkeypatch.setattr(torch, "compile", lambda run, **_options: run)
    scope = TunedScope(scope_parameters(tiny, 2))
    plain = FastForward(tiny, 2)
    rounded = FastForward(tiny, 2, graphs=True, compiled=whole, tuned=scope.parameters)
    rounded.use_graphs(False)
    try:
        for part in (batch, batch[:1], batch):
            wanted = plain.logits_at(plain.prepare(part), scope, POINTS)
            got = rounded.logits_at(rounded.prepare(part), scope, POINTS)
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    finally:
        scope.close()


@pytest.mark.skipif(which("g++") is None, reason="nothing to compile with")
def test_compiled_blocks_change_nothing() -> None:
    """Frozen blocks, the last one in its two halves, and the tuned one of each point."""
    model = load(ModelFields(dtype="float32", device="cpu"))
    scope = TunedScope(scope_parameters(model, 13))
    plain = FastForward(model, 13)
    compiled = FastForward(model, 13, compiled=True, tuned=scope.parameters)
    try:
        for batch in (SEVERAL, SINGLE, TEMPLATE):
            wanted = plain.logits_at(plain.prepare(batch), scope, POINTS)
            got = compiled.logits_at(compiled.prepare(batch), scope, POINTS)
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
            both = [path.logits(path.prepare(batch)) for path in (compiled, plain)]
            torch.testing.assert_close(*both, rtol=1e-5, atol=1e-4)
    finally:
        scope.close()


def test_the_last_block_computes_what_is_read(tiny: LoadedModel) -> None:
    """Its MLP sees as many tokens as there are scored places, and no more."""
    block, seen = tiny.decoder.blocks[-1], []
    linears = [m for m in block.modules() if list(m.parameters(recurse=False))]
    handles = [
        m.register_forward_pre_hook(lambda _m, args: seen.extend(a.shape for a in args[:1]))
        for m in linears
    ]
    fast = FastForward(tiny, 2)
    prepared = fast.prepare(SEVERAL)
    try:
        wanted = fast.logits(prepared)
    finally:
        for handle in handles:
            handle.remove()
    places, tokens = len(prepared.scored.position), prepared.input_ids.shape[1]
    assert places < tokens
    assert wanted.shape[0] == places
    if "DiffLlama" in type(tiny.model).__name__:
        assert tokens in seen[-1][:2], "attention is called twice, so all is computed"
        return
    whole = [shape for shape in seen if tokens in shape[:2]]
    assert 0 < len(whole) < len(seen) / 2


def test_keys_that_later_blocks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4 hands them on in a dictionary: its tuned blocks run by module, or not at all."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    config = transformers.Gemma4TextConfig(
        **(families._SIZES | families._GROUPED),
        global_head_dim=8,
        sliding_window=64,
        num_kv_shared_layers=3,
        vocab_size_per_layer_input=families.VOCABULARY,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    model = in_memory(AutoModelForCausalLM.from_config(config).eval())
    monkeypatch.setattr(torch, "compile", lambda run, **_options: run)
    monkeypatch.setattr("zo_core.zo.forward.PAIRED_SHARE", 1.0)  # its embeddings are nearly all
    reference = ReferenceForward(model)
    oracle = reference.prepare(SEVERAL)
    for layer in (0, 1):  # plain, and one that later blocks take keys from
        scope = TunedScope(scope_parameters(model, layer))
        fast = FastForward(model, layer, compiled=True, tuned=scope.parameters)
        prepared = fast.prepare(SEVERAL)
        assert fast.pairs(scope)
        try:
            pair = fast.logits_at(prepared, scope, POINTS)
            for got, wanted in zip(pair, reference.logits_at(oracle, scope, POINTS), strict=True):
                losses = [task_loss(got, prepared.scored), task_loss(wanted, oracle.scored)]
                torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        finally:
            scope.close()
    forward, reason = choose_forward(model, "auto", 4, SEVERAL)
    assert forward.name == "reference", "skipped blocks have made no keys"
    assert "cannot run this family" in reason


def test_spare_places_are_of_their_own_copy() -> None:
    """An fp8 suffix takes mean and difference of a place in the two copies."""
    ids, positions, packing, _ = pack([[(1, 2, 3)]], torch.device("cpu"))
    seen = []

    def run(row: Row) -> torch.Tensor:
        seen.append(row.places.view(2, -1) // (row.ids.shape[1] // 2))
        return torch.zeros(len(row.places), 1)

    graphed = GraphedForward(run, torch.device("cpu"), 4, torch.float32)
    graphed.capture = False
    graphed(ids, positions, torch.tensor([2]), None, packing, copies=2)
    assert seen[0].shape[1] > 1, "no place is spare: no test"
    assert seen[0][0].eq(0).all()
    assert seen[0][1].eq(1).all()


def test_a_full_bucket_reads_its_own_tokens_only() -> None:
    """Sixteen tokens leave no room in a bucket of sixteen; what pads its keys must exist."""
    start = tuple(range(8))
    group = [(*start, 8, 9, 10, 11), (*start, 12, 13, 14, 15)]
    ids, positions, packing, _ = pack([group], torch.device("cpu"))
    assert packing.tokens == 16
    read = []

    def run(row: Row) -> torch.Tensor:
        read.append(row.packing.key_index)
        return torch.zeros(row.ids.shape[1], 1)

    graphed = GraphedForward(run, torch.device("cpu"), 4, torch.float32)
    graphed.capture = False
    graphed(ids, positions, torch.arange(16), None, packing, copies=2)
    assert len(read[0]) > 2 * sum(packing.key_lengths), "nothing pads the keys: no test"
    assert read[0].max() < 32


@pytest.mark.parametrize(
    ("value", "axis"),
    [
        (torch.zeros(1, 32, 32), 1),
        (torch.zeros(32, 32), 0),
        (torch.zeros(1, 32, dtype=torch.int64), 1),
        (torch.zeros(32, 32, dtype=torch.int64), 0),  # [n T, experts of a token]
        (torch.zeros(1, 32, 4, 8), 1),
        (torch.zeros(1, 4, 32, 8), 2),
        (torch.zeros(1, 32, 32, 8), None),  # heads and tokens, or tokens and heads
        (torch.zeros(7, 32), None),  # as many channels as tokens in the row
        (None, None),
    ],
)
def test_where_the_tokens_are(value: torch.Tensor | None, axis: int | None) -> None:
    """For 32 tokens; no guess where there is none, or either of two."""
    if axis is not None:
        assert token_axis(value, 32) == axis
    else:
        with pytest.raises(NotTokenwiseError):
            token_axis(value, 32)


def test_points_side_by_side_equal_one_at_a_time(tiny: LoadedModel) -> None:
    """Four points at once give what each gives alone; the model's own weights are untouched."""
    fast = FastForward(tiny, 3)
    prepared = fast.prepare(SEVERAL)
    scope = TunedScope(scope_parameters(tiny, 3))
    points = [Point(DRAW, s) for s in (1e-2, -1e-2, 3e-2, 0.0)]
    before = {n: p.clone() for n, p in tiny.model.named_parameters()}
    together = fast.logits_at(prepared, scope, points)
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for point, got in zip(points, together, strict=True):
        scope.perturb(point)
        torch.testing.assert_close(got, fast.logits(prepared), rtol=1e-5, atol=1e-4)
    scope.close()
    assert all("forward" not in vars(m) for m in tiny.model.modules())


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    layer=st.integers(0, 15),
    start=st.integers(0, 4),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_lengths_on_the_bundled_model(
    demo: LoadedModel, lengths: list[int], layer: int, start: int
) -> None:
    """Whatever the lengths, and whatever rows begin with alike, packed equals padded."""
    batch = [
        example([*range(99, 99 + start), *(17 * i + j + 2 for j in range(n))], [5], [6])
        for i, n in enumerate(lengths)
    ]
    reference, fast = ReferenceForward(demo), FastForward(demo, layer)
    oracle, prepared = reference.prepare(batch), fast.prepare(batch)
    torch.testing.assert_close(
        candidate_scores(fast.logits(prepared), prepared.scored),
        candidate_scores(reference.logits(oracle), oracle.scored),
        rtol=1e-5,
        atol=1e-4,
    )


def test_a_family_that_cannot_be_packed_takes_the_reference_path(tmp_path: Path) -> None:
    """Bloom's attention is its own: the reason says so, and nothing is computed wrongly."""
    config = BloomConfig(**families._COMMON, hidden_size=32, n_layer=3, n_head=4)
    families.save(AutoModelForCausalLM.from_config(config).eval(), tmp_path)
    loaded = load(ModelFields(model=str(tmp_path), dtype="float32", device="cpu"))
    forward, reason = choose_forward(loaded, "auto", 1, SINGLE)
    assert forward.name == "reference"
    assert "cannot be packed" in reason


def test_a_template_is_computed_once(demo: LoadedModel) -> None:
    """All four rows begin with 1 2 3, the third with what a candidate adds to its prompt."""
    packing = FastForward(demo, 3).prepare(TEMPLATE).packing
    assert packing is not None
    alone = sum(FastForward(demo, 3).prepare([e]).input_ids.shape[1] for e in TEMPLATE)
    assert packing.tokens == alone - 3 * 3


def test_what_is_compiled(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen blocks above the tuned one, and the final norm after them; nothing that is tuned."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda run, **_: compiled.append(run.__self__) or run)
    blocks, norm = demo.decoder.blocks, demo.model.get_submodule("model.norm")
    fast = FastForward(demo, 13, compiled=True, tuned=scope_parameters(demo, 13))
    assert compiled == [*blocks[14:], norm, blocks[13]]
    assert "compiled" in fast.extras
    compiled.clear()
    FastForward(demo, 13, compiled=True, tuned=["model.norm.weight"])
    assert compiled == list(blocks[14:])
    compiled.clear()
    last = FastForward(demo, 15, compiled=True, tuned=scope_parameters(demo, 15))
    assert compiled == [blocks[15]]
    assert "compiled" not in last.extras, "no frozen block is"
