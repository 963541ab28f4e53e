"""Scopes: what each selects, exact restore, masks, shared z, and a model that is as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit import families
from zo_core.errors import UserError
from zo_core.jobs import ModelFields, ScanJob, TuneJob
from zo_core.models.load import LoadedModel, load
from zo_core.models.memory import LORA_RANK, PREFIX_LENGTH
from zo_core.scope_spec import FORMS, parse
from zo_core.tasks.texts import texts_of, tokenise
from zo_core.zo import noise
from zo_core.zo.optimizers import OPTIMIZERS
from zo_core.zo.scope import Draw, Point, TunedScope
from zo_core.zo.scopes import Selection, lora, select
from zo_core.zo.scopes.channels import channel_magnitudes
from zo_core.zo.scopes.random_layer import draw_layer

SCOPES = (
    "full",
    "layer:3",
    "layers:1,4",
    "attention:3",
    "mlp:3",
    "channels:3:top10%",
    "channels:3:rest10%",
    "all-but:3",
    "random-layer:0",
    "lora",
    "lora:3",
    "sparse:25",
    "prefix",
)
MASKED = ("channels:3:top10%", "channels:3:rest10%", "sparse:25")
DRAW = Draw("gaussian", seed=0, step=1)
ROW = [[5, 90, 17, 33, 2, 71]]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    """Tiny random models of a family, loaded fresh in a dtype."""
    folder = tmp_path_factory.mktemp("families")

    def get(name: str, dtype: str = "float32") -> LoadedModel:
        if not (folder / name).exists():
            families.save(families.build(name), folder / name)
        return load(ModelFields(model=str(folder / name), dtype=dtype, device="cpu"))

    return get


def bits(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in loaded.model.named_parameters()}


def scope_of(selection: Selection) -> TunedScope:
    return TunedScope(selection.parameters, selection.masks)


@torch.no_grad()
def logits(loaded: LoadedModel, rows: list[list[int]] = ROW) -> torch.Tensor:
    return loaded.model(input_ids=torch.tensor(rows), use_cache=False).logits


def test_every_form_is_tried_here() -> None:
    assert {parse(text).form for text in SCOPES} == set(FORMS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_restore_is_exact_for_every_scope(family: Callable[..., LoadedModel], dtype: str) -> None:
    """Perturbed both ways and updated with lr 0, every weight and module is as it was."""
    loaded = family("llama", dtype)
    before, modules = bits(loaded), {n: id(m) for n, m in loaded.model.named_modules()}
    attributes = set(vars(loaded.model))
    reference = logits(loaded)
    for text in SCOPES:
        selection = select(loaded, parse(text), dominant=3)
        scope = scope_of(selection)
        inside = {n: p.clone() for n, p in selection.parameters.items()}
        for kind in ("gaussian", "rademacher", "sphere"):
            draw = Draw(kind, 0, 1)
            scope.perturb(Point(draw, 1e-3))
            scope.perturb(Point(draw, -1e-3))
            OPTIMIZERS["zo-sgd"](TuneJob(noise=kind)).update(scope, [draw], [123.0], lr=0.0)
        assert all(torch.equal(p, inside[n]) for n, p in selection.parameters.items()), text
        scope.perturb(Point(DRAW, 1e-1))
        assert not torch.equal(logits(loaded), reference), f"{text} reaches the output"
        scope.close()
        selection.close()
        assert {n: id(m) for n, m in loaded.model.named_modules()} == modules, text
        assert set(vars(loaded.model)) == attributes, text
        assert not loaded.model._forward_pre_hooks
        after = dict(loaded.model.named_parameters())
        assert all(torch.equal(p, before[n]) for n, p in after.items()), text
        assert not any(p.requires_grad for p in after.values())
        assert torch.equal(logits(loaded), reference), text


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_entries_outside_a_mask_never_change(
    family: Callable[..., LoadedModel], optimizer: str
) -> None:
    """Not by the perturbation, the update or weight decay; inside, entries do change."""
    loaded = family("llama")
    for text in MASKED:
        selection = select(loaded, parse(text))
        scope = scope_of(selection)
        before = {n: p.clone() for n, p in scope.parameters.items()}
        scope.perturb(Point(DRAW, 1e-2))
        perturbed = {n: p.clone() for n, p in scope.parameters.items()}
        rule = OPTIMIZERS[optimizer](TuneJob(optimizer=optimizer, weight_decay=0.1))
        changed = rule.update(scope, [DRAW], [3.0], lr=1e-2, count=True)
        for name, mask in scope.masks.items():
            for now in (perturbed[name], scope.parameters[name]):
                assert torch.equal(now[~mask], before[name][~mask])
                assert bool((now[mask] != before[name][mask]).any())
        tuned = sum(int(m.sum()) for m in scope.masks.values())
        whole = sum(p.numel() for n, p in scope.parameters.items() if n not in scope.masks)
        assert scope.size == tuned + whole
        assert changed is not None
        assert 0.9 * scope.size < changed <= scope.size
        scope.close()


@pytest.mark.parametrize("name", list(families.CONFIGS))
def test_parts_and_channels_partition_a_layer(
    family: Callable[..., LoadedModel], name: str
) -> None:
    """Attention, MLP and norms make a layer; so do top channels and rest, entry by entry."""
    loaded = family(name)
    layer, attention, mlp, top, rest = (
        select(loaded, parse(text))
        for text in (
            "layer:3",
            "attention:3",
            "mlp:3",
            "channels:3:top10%",
            "channels:3:rest10%",
        )
    )
    assert not set(attention.parameters) & set(mlp.parameters)
    left = set(layer.parameters) - set(attention.parameters) - set(mlp.parameters)
    assert left
    assert all("norm" in n or "ln_" in n for n in left)
    assert set(rest.parameters) == set(layer.parameters)
    assert set(top.parameters) <= set(mlp.parameters)
    assert set(top.masks) == set(rest.masks) == set(top.parameters)
    for n, mask in top.masks.items():
        assert torch.equal(mask, ~rest.masks[n])
    assert scope_of(top).size + scope_of(rest).size == scope_of(layer).size
    # 10 % of 48 (OPT too) is 5 channels: a row of each up matrix and a column of the down matrix.
    matrices = [m for m in top.masks.values() if m.dim() == 2]
    assert all(int(m.sum()) == 5 * families.HIDDEN for m in matrices)
    assert all(int(m.sum()) == 5 for m in top.masks.values() if m.dim() == 1)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox"])
def test_the_planted_neuron_is_the_top_channel(name: str, tmp_path: Path) -> None:
    """A neuron that one token of the scan text drives is found, in every weight layout."""
    plain = load(
        ModelFields(model=str(families.save(families.build(name), tmp_path / "a")), device="cpu")
    )
    job = ScanJob(sequences=8, max_tokens=128)
    token = tokenise(texts_of(job), plain.tokenizer, "auto", 128)[0][5]
    planted = families.build(name, families.Plant(3, token, 9, 40.0))
    loaded = load(ModelFields(model=str(families.save(planted, tmp_path / "b")), device="cpu"))
    assert int(channel_magnitudes(loaded, 3).argmax()) == families.UNIT
    chosen = select(loaded, parse("channels:3:top1%"))
    for n, mask in chosen.masks.items():
        if mask.dim() == 2:
            down = any(n.endswith(f"{o}.weight") for o in families.OUTPUTS)
            along = mask.T if (name == "gpt2") != down else mask
            assert along.any(1).nonzero().flatten().tolist() == [families.UNIT], n


def test_z_is_shared_between_scopes(family: Callable[..., LoadedModel]) -> None:
    """Inside its mask a scope sees the z of the full model; on the sphere up to one scalar."""
    loaded = family("llama")
    full = scope_of(select(loaded, parse("full")))
    for text in SCOPES:
        if parse(text).form in ("lora", "prefix"):
            continue
        scope = scope_of(select(loaded, parse(text), dominant=3))
        ratios = set()
        for name in scope.parameters:
            mask = scope.masks.get(name, torch.ones_like(scope.parameters[name], dtype=torch.bool))
            z = scope.z(name, DRAW)
            assert torch.equal(z[mask], full.z(name, DRAW)[mask]), (text, name)
            assert not bool(z[~mask].any())
        ball = Draw("sphere", 0, 1)
        for name in scope.parameters:
            mask = scope.masks.get(name, torch.ones_like(scope.parameters[name], dtype=torch.bool))
            ratio = (scope.z(name, ball)[mask] / full.z(name, ball)[mask]).double()
            ratios |= {round(float(r), 5) for r in (ratio.min(), ratio.max())}
        assert max(ratios) - min(ratios) < 3e-5, (text, ratios)
    single = select(loaded, parse("lora:3"))
    alone = {n: scope_of(single).z(n, DRAW) for n in single.parameters}
    single.close()
    every = select(loaded, parse("lora"))
    assert all(torch.equal(scope_of(every).z(n, DRAW), z) for n, z in alone.items())
    every.close()


def test_sphere_has_its_radius_whatever_the_chunks(
    family: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """|z| = sqrt(d) over the tuned entries; the norm is the same bits in any chunks."""
    loaded = family("llama")
    ball = Draw("sphere", 4, 2)
    found = []
    for chunk in (1 << 18, 512):
        monkeypatch.setattr(noise, "_CHUNK", chunk)
        scope = scope_of(select(loaded, parse("channels:3:rest10%")))
        zs = [scope.z(n, ball) for n in scope.parameters]
        squares = sum(float(z.double().square().sum()) for z in zs)
        assert squares == pytest.approx(scope.size, rel=1e-5)
        found.append(zs)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_full_and_its_parts_hold(family: Callable[..., LoadedModel]) -> None:
    """A tied embedding counts once; all-but and the layer make the full model."""
    for name in ("llama", "gpt2"):
        loaded = family(name)
        full = select(loaded, parse("full"))
        assert scope_of(full).size == sum(p.numel() for p in loaded.model.parameters())
        rest, layer = select(loaded, parse("all-but:3")), select(loaded, parse("layer:3"))
        assert set(rest.parameters) | set(layer.parameters) == set(full.parameters)
        assert not set(rest.parameters) & set(layer.parameters)
    lowest = {text: select(family("llama"), parse(text), 3).lowest for text in SCOPES}
    assert lowest["layers:1,4"] == 1
    assert lowest["full"] is lowest["all-but:3"] is lowest["sparse:25"] is None
    assert lowest["lora"] == 0
    assert {lowest[t] for t in ("layer:3", "attention:3", "mlp:3", "lora:3", *MASKED[:2])} == {3}


def test_random_layer_is_any_but_the_dominant_one() -> None:
    """Uniform over the others: 15 layers, 3000 seeds, each within 5 standard errors."""
    drawn = [draw_layer(seed, 16, 3) for seed in range(3000)]
    counts = [drawn.count(k) for k in range(16)]
    assert counts[3] == 0
    spread = (3000 * (1 / 15) * (14 / 15)) ** 0.5
    assert all(abs(c - 200) < 5 * spread for k, c in enumerate(counts) if k != 3)
    assert {draw_layer(seed, 4, None) for seed in range(50)} == {0, 1, 2, 3}
    assert draw_layer(0, 1, 0) == 0


def test_sparse_takes_the_smallest_weights(family: Callable[..., LoadedModel]) -> None:
    """In every matrix: the share asked for, and no larger weight than any left out."""
    selection = select(family("llama"), parse("sparse:25"))
    assert all(p.dim() >= 2 for p in selection.parameters.values())
    for name, weight in selection.parameters.items():
        mask = selection.masks[name]
        zeros = int((weight == 0).sum())  # the family's embeddings have a column of zeros: ties
        assert abs(int(mask.sum()) - weight.numel() / 4) <= max(1, zeros)
        assert weight[mask].abs().max() <= weight[~mask].abs().min()


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_lora_starts_as_the_model_and_is_a_function_of_the_seed(
    family: Callable[..., LoadedModel], name: str
) -> None:
    """B = 0 leaves the logits as they were; A depends on seed and name alone."""
    loaded = family(name, "bfloat16" if name == "qwen3" else "float32")
    before = logits(loaded)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(99 + len(seen))  # what the process drew before does not matter
        selection = select(loaded, parse("lora:3"), seed=seed)
        assert torch.equal(logits(loaded), before)
        assert all(f".{3}." in n for n in selection.parameters)
        assert {p.dtype for p in selection.parameters.values()} == {loaded.dtype}
        assert all(LORA_RANK in p.shape for p in selection.parameters.values())
        seen.append({n: p.clone() for n, p in selection.parameters.items()})
        selection.close()
    assert all(torch.equal(seen[0][n], seen[1][n]) for n in seen[0])
    assert any(not torch.equal(seen[0][n], seen[2][n]) for n in seen[0])


def test_lora_of_an_unknown_family_is_one_sentence(
    family: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = family("llama")
    attributes = set(vars(loaded.model))
    with monkeypatch.context() as patch:
        patch.setitem(lora.TARGETS, "llama", ["c_attn"])
        with pytest.raises(UserError, match="finds no q and v"):
            select(loaded, parse("lora"))
    assert set(vars(loaded.model)) == attributes
    monkeypatch.delitem(lora.TARGETS, "llama")
    with pytest.raises(UserError, match="which modules of a llama model are q and v"):
        select(loaded, parse("lora"))


@pytest.mark.parametrize("name", list(families.CONFIGS))
def test_prefix_starts_as_the_tokens_it_was_made_of(
    family: Callable[..., LoadedModel], name: str
) -> None:
    """Virtual keys and values of 5 tokens = the tokens themselves in front, padded rows too."""
    loaded = family(name)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(
        loaded.info.vocab_size, (1, PREFIX_LENGTH), generator=generator
    ).tolist()[0]
    wanted = logits(loaded, [tokens + ROW[0]])[:, PREFIX_LENGTH:]
    selection = select(loaded, parse("prefix"), seed=7)
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        mask = torch.tensor([[0, 0] + [1] * 6])
        padded = loaded.model(
            input_ids=torch.tensor([[0, 0] + ROW[0]]),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).logits[:, 2:]
    torch.testing.assert_close(padded, wanted, rtol=1e-4, atol=1e-5)
    assert scope_of(selection).size > 0
    selection.close()


@pytest.mark.parametrize(
    "text", ["layer:6", "layers:1,6", "attention:9", "channels:6:top1%", "all-but:6", "lora:6"]
)
def test_a_layer_that_is_not_there_names_the_range(
    family: Callable[..., LoadedModel], text: str
) -> None:
    with pytest.raises(UserError, match="layers 0 to 5"):
        select(family("llama"), parse(text))
