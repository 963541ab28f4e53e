"""Planted truth: the writer, its neuron, the remover and the loss are known and must be found."""

import random
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from tests.unit import families
from tests.unit import planted as planted_families
from tests.unit.families import HIDDEN, LAYERS, UNIT, Plant
from zo_core import runs
from zo_core.analysis.interventions import intervene, ordinary_channels, text_loss
from zo_core.analysis.mechanism import find_sites, massive_tokens, trace
from zo_core.analysis.recording import Recording
from zo_core.analysis.sinks import sink_shares, without_sinks
from zo_core.jobs import MechanismJob, ModelFields
from zo_core.models.decoder import find_decoder, hidden_of
from zo_core.models.load import LoadedModel, load
from zo_core.models.parts import find_parts
from zo_core.progress import JobContext
from zo_core.recipes.mechanism import run_mechanism
from zo_core.runs import Process
from zo_core.settings import settings

PLANT = Plant(layer=2, token=4242, channel=19, weight=2e4)
REMOVER, REMOVING_UNIT = 4, 11
SEQUENCE, POSITION = 1, 3


def sequences() -> list[list[int]]:
    """Three texts of different lengths; the planted token is in the second."""
    draw = random.Random(0)
    found = [[draw.randrange(2, 4000) for _ in range(n)] for n in (9, 14, 5)]
    found[SEQUENCE][POSITION] = PLANT.token
    return found


def of_layer(model: torch.nn.Module, layer: int, names: tuple[str, ...]) -> list[torch.nn.Module]:
    """The named modules of a layer."""
    block = find_decoder(model).blocks[layer]
    return [m for n, m in block.named_modules() if n in names]


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """Its weight [out, in]; GPT-2's Conv1D holds [in, out]."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


@torch.no_grad()
def add_remover(model: torch.nn.Module) -> None:
    """One unit of a later layer looks at the massive channel and writes its negative."""
    for module in of_layer(model, REMOVER, families.INPUTS):
        weight_of(module)[REMOVING_UNIT] = 0.0
        weight_of(module)[REMOVING_UNIT, PLANT.channel] = 1.0
    (down,) = of_layer(model, REMOVER, families.OUTPUTS)
    weight_of(down)[PLANT.channel] = 0.0
    units: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    handles = [
        down.register_forward_pre_hook(lambda _m, a: units.append(a[0])),
        find_decoder(model)
        .blocks[REMOVER]
        .register_forward_hook(lambda _m, _a, o: outputs.append(hidden_of(o))),
    ]
    model(input_ids=torch.tensor([sequences()[SEQUENCE]]))
    for handle in handles:
        handle.remove()
    unit = units[0].reshape(-1, units[0].shape[-1])[POSITION, REMOVING_UNIT]
    massive = outputs[0][0, POSITION, PLANT.channel]
    weight_of(down)[PLANT.channel, REMOVING_UNIT] = -massive / unit


def planted(family: str, folder: Path, remover: bool) -> LoadedModel:
    model = families.build(family, PLANT)
    if remover:
        add_remover(model)
    families.save(model, folder)
    return load(ModelFields(model=str(folder), dtype="float32", device="cpu"))


# Gemma-2 normalises what a block adds: a weight cannot be set to remove an exact amount.
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "phi"])
def test_planted_writer_neuron_and_remover_are_found(family: str, tmp_path: Path) -> None:
    removes = family != "gemma2"
    loaded = planted(family, tmp_path, removes)
    recording = Recording(loaded, sequences(), batch_size=2)
    (site,) = find_sites(recording, channels=3)
    assert (site.sequence, site.position, site.channel) == (SEQUENCE, POSITION, PLANT.channel)
    assert PLANT.layer <= site.layer < (REMOVER if removes else LAYERS)

    traced = trace(recording, [site])
    row = traced.sites.iloc[0]
    assert (row["writer_layer"], row["writer"]) == (PLANT.layer, "mlp")
    assert row["written"] == pytest.approx(row["value"], rel=0.05)
    if removes:
        assert (row["remover_layer"], row["remover"]) == (REMOVER, "mlp")
        assert row["removed"] == pytest.approx(-row["value"], rel=0.05)
    else:
        assert pd.isna(row["remover_layer"])
        assert row["final"] == pytest.approx(row["value"], rel=0.2)
    first = traced.neurons.groupby("role").first()
    assert first.at["writer", "neuron"] == UNIT
    assert first.at["writer", "row"] == PLANT.channel
    assert first.at["writer", "share"] == pytest.approx(1.0, abs=1e-3)
    if removes:
        assert first.at["remover", "neuron"] == REMOVING_UNIT

    # The parts add up: the stream at the site is followed without a gap.
    table = traced.contributions
    assert list(table["layer"]) == list(range(LAYERS))
    scale = abs(site.value) * 1e-5
    added = table["before"] + table["attention"] + table["mlp"]
    assert (added - table["after"]).abs().max() <= scale
    assert (table["before"].to_numpy()[1:] == table["after"].to_numpy()[:-1]).all()
    outputs = recording.batches[0].outputs
    stored = [float(o[SEQUENCE, POSITION, PLANT.channel]) for o in outputs]
    assert table["after"].tolist() == pytest.approx(stored, rel=1e-4, abs=scale)


@pytest.mark.parametrize("family", sorted(planted_families.FAMILIES))
def test_every_family_can_be_looked_into(family: str) -> None:
    plant = planted_families.Plant(layer=2, token=PLANT.token, channel=PLANT.channel)
    loaded = planted_families.in_memory(planted_families.build(family, plant))
    recording = Recording(loaded, sequences(), batch_size=2)
    (site,) = find_sites(recording, channels=1)
    traced = trace(recording, [site])
    row = traced.sites.iloc[0]
    place = ["sequence", "position", "channel", "writer_layer", "writer"]
    assert row[place].tolist() == [SEQUENCE, POSITION, PLANT.channel, plant.layer, "mlp"]
    writers = traced.neurons[traced.neurons["role"] == "writer"]
    units = planted_families.UNIT
    if family in planted_families.MOE:  # the plant is in every expert: those of the token write
        experts = find_parts(loaded.decoder.blocks[plant.layer]).experts
        assert experts is not None
        chosen = writers[writers["share"].abs() > 0.01]
        assert set(chosen["neuron"] % experts.width) == {units}
        all_of_it = pytest.approx(1.0, abs=1e-3)
        if family == "qwen2-moe":  # its shared expert has the plant, too, and writes the rest
            assert 0.1 < chosen["share"].sum() < 0.9
        else:
            assert chosen["share"].sum() == all_of_it
    else:
        assert writers["neuron"].iloc[0] == units

    marked = massive_tokens(recording, site)
    sinks = sink_shares(recording, marked)
    # Its norm comes after the plant: the channel is massive at every token.
    if family == "opt-post-ln":
        assert "without being massive itself" in without_sinks(recording, marked)
    else:
        assert sinks["layer"].nunique() == LAYERS
        assert sinks["share"].between(0, 1).all()
    base = text_loss(recording)
    for layer in (0, 3, LAYERS - 1):  # starting above the frozen blocks changes nothing
        assert text_loss(recording, layer) == pytest.approx(base, rel=1e-6)


@torch.no_grad()
def direct_loss(loaded: LoadedModel, layer: int, channel: int, value: float) -> float:
    """Loss with one entry of one block's output set, each text alone and unpadded."""
    losses = []
    for number, tokens in enumerate(sequences()):

        def put(_m: object, _a: object, output: object, number: int = number) -> object:
            hidden = output[0] if isinstance(output, tuple) else output
            if number == SEQUENCE:
                hidden[0, POSITION, channel] = value
            return output

        handle = loaded.decoder.blocks[layer].register_forward_hook(put)
        ids = torch.tensor([tokens])
        logits = loaded.model(input_ids=ids, use_cache=False).logits[0]
        handle.remove()
        losses.append(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_interventions_equal_a_direct_computation(family: str, tmp_path: Path) -> None:
    loaded = planted(family, tmp_path, remover=True)
    recording = Recording(loaded, sequences(), batch_size=3)
    sites = find_sites(recording, channels=1)
    base, table = intervene(recording, sites)
    assert base == pytest.approx(text_loss(recording))
    found = table.set_index(["layer", "intervention"])
    (control,) = ordinary_channels(recording, [PLANT.channel])
    assert control != PLANT.channel
    for layer in range(LAYERS):
        zero = direct_loss(loaded, layer, PLANT.channel, 0.0)
        assert found.at[(layer, "zero"), "loss"] == pytest.approx(zero, rel=1e-5)
        # One token carries it: its mean is its own value, and nothing changes.
        assert found.at[(layer, "mean"), "change"] == pytest.approx(0.0, abs=1e-6)
        other = direct_loss(loaded, layer, control, 0.0)
        assert found.at[(layer, "control"), "loss"] == pytest.approx(other, rel=1e-5)
    massive = found.at[(PLANT.layer, "zero"), "change"]
    assert abs(massive) > 1e-4
    assert abs(massive) > 10 * abs(found.at[(PLANT.layer - 1, "zero"), "change"])


def test_sink_share_is_the_attention_on_the_massive_token(tmp_path: Path) -> None:
    loaded = planted("llama", tmp_path, remover=False)
    texts = [sequences()[SEQUENCE]]
    recording = Recording(loaded, texts, batch_size=1)
    (site,) = find_sites(recording, channels=1)
    (marked,) = massive_tokens(recording, site)
    assert marked.nonzero().tolist() == [[0, POSITION]]
    table = sink_shares(recording, [marked])
    before = loaded.model.config._attn_implementation
    loaded.model.config._attn_implementation = "eager"
    weights = loaded.model(torch.tensor(texts), output_attentions=True).attentions
    loaded.model.config._attn_implementation = before
    queries = range(POSITION + 1, len(texts[0]))
    for layer, of_layer in enumerate(weights):
        share = of_layer[0, :, POSITION + 1 :, POSITION].mean(-1)
        own = table[table["layer"] == layer].sort_values("head")
        assert own["share"].tolist() == pytest.approx(share.tolist(), rel=1e-5)
    uniform = sum(1 / (q + 1) for q in queries) / len(queries)
    assert table["uniform"].iloc[0] == pytest.approx(uniform)


def test_without_a_plant_nothing_is_called_massive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path / "cache")
    families.save(families.build("llama"), tmp_path / "model")
    job = MechanismJob(
        model=str(tmp_path / "model"),
        device="cpu",
        dtype="float32",
        text="prompt",
        prompt="A quiet film about a lighthouse and the sea around it.",
        channels=2,
    )
    run = runs.create(job, Process.current())
    run_mechanism(job, run, JobContext(run))
    summary = run.result_json()
    assert summary["first_outlier_layer"] is None
    assert "None found" in summary["reason"]
    assert summary["loss_change"].keys() == {"zero", "mean", "control"}
    for name in ("sites", "contributions", "neurons", "sinks", "interventions"):
        assert len(pd.read_parquet(run.result(f"{name}.parquet"))) == len(
            pd.read_csv(run.result(f"{name}.csv"))
        )
    assert len(pd.read_parquet(run.result("sinks.parquet"))) == LAYERS * 4
    assert HIDDEN > summary["channels"][0] >= 0
