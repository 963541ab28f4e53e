"""Streaming block by block: the same bits as the ordinary scan, and clear words on bad files."""

import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.families import save
from tests.unit.planted import HIDDEN, Plant, build
from zo_core.analysis import streaming
from zo_core.analysis.activations import ActivationScan
from zo_core.analysis.streaming import scan_blockwise
from zo_core.errors import UserError
from zo_core.jobs import ModelFields
from zo_core.models.blockwise import BlockwiseModel
from zo_core.models.load import load

PLANT = Plant(layer=2, token=4242, channel=19)
FEW = (
    "llama",
    "gpt2",
    "opt-post-ln",
    "qwen2-moe",
    "mixtral",
    "gemma3",
    "falcon",
    "bloom",
    "mpt",
    "phi3",
    "gpt-neox",
)
"""One of each kind: fused and stacked weights, tuples, tied embeddings, masks by layer."""
TABLES = ("parts", "layers", "channels", "tokens", "weights", "owl")


def sequences() -> list[list[int]]:
    draw = random.Random(3)
    ids = [[draw.randrange(2, 4000) for _ in range(n)] for n in (9, 4, 17, 12, 6)]
    ids[2][3] = PLANT.token
    return ids


def assert_same(one: ActivationScan, other: ActivationScan) -> None:
    for name in TABLES:
        pd.testing.assert_frame_equal(
            getattr(one, name)(), getattr(other, name)(), check_exact=True
        )


@pytest.mark.parametrize("family", FEW)
def test_streaming_gives_the_bits_of_the_ordinary_scan(tmp_path: Path, family: str) -> None:
    folder = save(build(family, PLANT), tmp_path, max_shard_size="200KB")
    fields = ModelFields(model=str(folder), device="cpu")
    whole = ActivationScan(load(fields))
    whole.run(sequences(), 2)
    blockwise = BlockwiseModel(fields)
    streamed = ActivationScan(blockwise.loaded)
    scan_blockwise(streamed, blockwise, sequences(), 2)
    assert_same(whole, streamed)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A Llama in several files."""
    return save(build("llama", PLANT), tmp_path, max_shard_size="100KB")


def test_hidden_states_may_wait_in_files(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the batches beyond the budget: the same bits."""
    blockwise = BlockwiseModel(ModelFields(model=str(sharded), device="cpu"))
    scans = []
    for budget in (1 << 30, 4000):
        monkeypatch.setitem(streaming.BUDGET, "cpu", budget)
        scans.append(ActivationScan(blockwise.loaded))
        scan_blockwise(scans[-1], blockwise, sequences(), 2)
    assert_same(*scans)


def test_only_one_block_is_in_memory(sharded: Path) -> None:
    blockwise = BlockwiseModel(ModelFields(model=str(sharded), device="cpu"))
    blocks = blockwise.loaded.decoder.blocks

    def here() -> list[int]:
        return [k for k, b in enumerate(blocks) if not all(p.is_meta for p in b.parameters())]

    assert here() == []
    with blockwise.block(2):
        assert here() == [2]
    assert here() == []


def test_offloaded_weights_give_the_bits_of_the_ordinary_scan(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Room for the embedding and some blocks only: the others come from disk, layer by layer."""
    fields = ModelFields(model=str(sharded), device="cpu")
    folder = tmp_path_factory.mktemp("offload")
    offloaded = load(fields, folder, {"cpu": 2_200_000})
    devices = {p.device.type for p in offloaded.model.parameters()}
    assert devices == {"cpu", "meta"}, devices
    scans = []
    for loaded in (load(fields), offloaded):
        scans.append(ActivationScan(loaded))
        scans[-1].run(sequences(), 2)
    assert_same(*scans)


def test_bad_shard_is_named(sharded: Path) -> None:
    """Cut short, missing, of another model, or without what the index looks for in it."""
    shards = sorted(sharded.glob("model-*.safetensors"))
    fields = ModelFields(model=str(sharded), device="cpu")
    for read in (load, lambda f: scan_all(BlockwiseModel(f))):
        for spoil, said in (
            (lambda f: f.write_bytes(f.read_bytes()[:-50]), "download it again"),
            (lambda f: f.unlink(), "index names"),
            (lambda f: f.write_bytes(shards[1].read_bytes()), "index looks for there"),
            (lambda f: f.write_bytes(b"<html>"), "no readable safetensors file"),
        ):
            kept = shards[2].read_bytes()
            spoil(shards[2])
            with pytest.raises(UserError) as caught:
                read(fields)
            assert shards[2].name in str(caught.value)
            assert said in str(caught.value)
            shards[2].write_bytes(kept)


def test_weight_of_another_shape_is_named(sharded: Path) -> None:
    """A shard of a wider model under the right name."""
    file = next(f for f in sharded.glob("*.safetensors") if NORM in load_file(f))
    tensors = load_file(file)
    save_file(tensors | {NORM: torch.ones(HIDDEN + 1)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{file.name}.*{NORM}"):
        scan_all(BlockwiseModel(ModelFields(model=str(sharded), device="cpu")))


NORM = "model.layers.3.input_layernorm.weight"


def scan_all(model: BlockwiseModel) -> None:
    scan_blockwise(ActivationScan(model.loaded), model, sequences(), 4)
