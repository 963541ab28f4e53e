"""What a model is, from its files alone: shapes, sizes, and a sentence for every bad folder."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.families import CONFIGS, HIDDEN, LAYERS, VOCABULARY, build, save
from zo_core.jobs import ModelFields
from zo_core.models import memory
from zo_core.models.catalog import BYTES_PER_VALUE, DEMO_PATH, ModelError, describe, resolve
from zo_core.models.load import load
from zo_core.models.memory import estimate

ROOMY = 200
"""KiB: a shard size that splits a tiny model into several files."""


def refused(model: str) -> str:
    """The sentence that a model is refused with."""
    with pytest.raises(ModelError) as caught:
        describe(model)
    sentence = str(caught.value)
    assert sentence.startswith("model: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in DEMO_PATH.iterdir():
        if file.suffix in {".json", ".safetensors"}:
            shutil.copyfile(file, folder / file.name)
    return folder


def test_bundled_model() -> None:
    info = describe("demo")
    config = json.loads((DEMO_PATH / "config.json").read_text())
    assert (info.source, info.path) == ("bundled", str(DEMO_PATH))
    assert info.architecture == "LlamaForCausalLM"
    assert info.n_layers == config["num_hidden_layers"] == 16
    assert info.hidden_size == config["hidden_size"]
    assert info.vocab_size == config["vocab_size"]
    assert info.context == config["max_position_embeddings"]
    assert info.tied_embeddings
    assert info.stored_dtype == "bfloat16"
    assert info.has_bos is False
    assert 10e6 < info.parameters < 20e6
    weights = DEMO_PATH / "model.safetensors"
    assert weights.stat().st_size <= 32e6
    assert 0 <= weights.stat().st_size - 2 * info.parameters < 50_000, "the rest is its header"


def test_copy_in_a_local_folder_is_the_same_model(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, demo = describe(str(copied)), describe("demo")
    assert info.source == "local"
    for name in ("parameters", "layer_parameters", "n_layers", "config", "stored_dtype"):
        assert getattr(info, name) == getattr(demo, name)
    monkeypatch.chdir(copied.parent)
    assert describe("model").parameters == describe("./model/").parameters == demo.parameters
    monkeypatch.setenv("HOME", str(copied.parent))
    assert resolve("~/model") == ("local", str(copied))


def test_every_family_is_described_as_it_loads(tmp_path: Path) -> None:
    for family in CONFIGS:
        folder = save(build(family), tmp_path / family)
        info = describe(str(folder))
        loaded = load(ModelFields(model=str(folder), device="cpu"))
        assert info.n_layers == len(loaded.decoder) == LAYERS, family
        assert (info.hidden_size, info.vocab_size) == (HIDDEN, VOCABULARY)
        assert info.context == 128
        assert info.model_type == loaded.model.config.model_type
        assert info.architecture == type(loaded.model).__name__
        blocks = [sum(p.numel() for p in b.parameters()) for b in loaded.decoder.blocks]
        assert info.layer_parameters == max(blocks), family
        assert info.parameters == sum(p.numel() for p in loaded.model.parameters()), family
        assert estimate(info, "float32").weights == loaded.bytes, family


@pytest.mark.parametrize("dtype", BYTES_PER_VALUE)
def test_estimated_weights_are_the_bytes_that_are_loaded(dtype: str) -> None:
    info = describe("demo")
    loaded = load(ModelFields(device="cpu", dtype=dtype))
    size = estimate(info, dtype)
    assert size.weights == loaded.bytes == info.parameters * BYTES_PER_VALUE[dtype]
    uses = [size.scan, size.tune_layer, size.probe, size.tune_full]
    assert uses == sorted(uses)
    assert size.weights < min(uses)
    assert size.tune_full - size.tune_layer >= 4 * (info.parameters - info.layer_parameters)


def test_a_larger_batch_needs_more_memory() -> None:
    info = describe("demo")
    small, large = estimate(info, "float32", rows=1, tokens=8), estimate(info, "float32", rows=64)
    gpu = estimate(info, "bfloat16", device_bytes=2**36)
    assert gpu.tune_layer > estimate(info, "bfloat16").tune_layer  # its graphs
    assert gpu.weights == estimate(info, "bfloat16").weights
    for name in memory.MemoryEstimate.__dataclass_fields__:
        assert (getattr(large, name) > getattr(small, name)) == (name != "weights"), name


def test_shards_are_added_up(tmp_path: Path) -> None:
    model = build("llama")
    whole = describe(str(save(model, tmp_path / "whole")))
    sharded = save(model, tmp_path / "sharded", max_shard_size=f"{ROOMY}KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    assert len(list(sharded.glob("*.safetensors"))) > 2
    info = describe(str(sharded))
    for name in ("parameters", "layer_parameters", "n_layers", "stored_dtype"):
        assert getattr(info, name) == getattr(whole, name)
    loaded = load(ModelFields(model=str(sharded), device="cpu"))
    assert loaded.bytes == estimate(info, "float32").weights


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "consolidated.safetensors"])
def test_files_that_are_not_loaded_are_not_counted(tmp_path: Path, name: str) -> None:
    """Mistral's folders hold the weights twice; the index, or model.safetensors, says which."""
    folder = save(build("llama"), tmp_path)
    parameters = describe(str(folder)).parameters
    save_file({"layers.0.other.weight": torch.zeros(32, 32)}, folder / name)
    assert describe(str(folder)).parameters == parameters


# -- folders that are no models ----------------------------------------------------------------


def test_folder_without_config(tmp_path: Path) -> None:
    assert refused(str(tmp_path)) == f"model: {tmp_path} is no model folder: it has no config.json."


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    sentence = refused(str(tmp_path / "weights.safetensors"))
    assert "is a file: give the folder that holds config.json" in sentence


def test_pickle_weights_are_not_opened(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    assert "only pickle weights (.bin): convert them to safetensors" in refused(str(copied))
    (copied / "pytorch_model.bin").unlink()
    assert "needs *.safetensors weights and has none" in refused(str(copied))


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"', "\ufeff{}"])
def test_broken_config_is_named(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    assert str(copied / "config.json") in refused(str(copied))


def test_config_in_another_encoding_is_named(copied: Path) -> None:
    (copied / "config.json").write_bytes(b"\xff\xfe{")
    assert "cannot read" in refused(str(copied))


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file of this header."""
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        header(b"{}", 10**12),
        header(b"{}", 2**64 - 1),
        header(b'{"a": {"dtype": "F32", "sha'),
        header(b"\xff\xff\xff"),
        header(b'{"a": {"dtype": "F32"}}'),
        header(b'{"a": 7}'),
        header(b"[1, 2]"),
        b"<!DOCTYPE html><html>an error page that was saved as weights</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_broken_weights_file_is_named(copied: Path, content: bytes) -> None:
    broken = copied / "model.safetensors"
    broken.write_bytes(content)
    assert f"{broken} is no readable safetensors file" in refused(str(copied))


def test_one_broken_shard_is_named(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path, max_shard_size=f"{ROOMY}KB")
    broken = sorted(folder.glob("*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:100])
    assert str(broken) in refused(str(folder))


def spoil(key: str) -> Callable[[Path], None]:
    """Take a key out of config.json."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        del config[key]
        path.write_text(json.dumps(config))

    return apply


def replace_weights(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    """Other tensors under the same name."""
    return lambda folder: save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        replace_weights({"vision.weight": torch.zeros(3)}),
        replace_weights({}),
    ],
    ids=["no layers", "no tensors"],
)
def test_folder_of_something_else(copied: Path, change: Callable[[Path], None]) -> None:
    change(copied)
    sentence = refused(str(copied))
    assert "does not look like a causal language model" in sentence
    assert str(copied) in sentence


@pytest.mark.parametrize(
    "model",
    [
        "no such folder",
        "./nowhere",
        "/nowhere/at/all",
        "a/b/c",
        "../up",
        "~/nowhere",
        "org/",
        "-x",
        "bad\0name",
        "~nobody-of-this-name/model",
        "x" * 300,
    ],
)
def test_nonsense_is_refused_without_asking_the_hub(model: str) -> None:
    sentence = refused(model)
    assert "it is no hub id: give demo, an existing folder, or an id such as" in sentence


@pytest.mark.parametrize("model", ["gpt2", "Qwen/Qwen3-8B", "a.b-c_d/e.f"])
def test_hub_ids_are_told_from_folders(model: str) -> None:
    assert resolve(model) == ("hub", model)


def test_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build("llama"), tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2")[0] == "local"
    (tmp_path / "demo").mkdir()
    assert resolve("demo")[0] == "bundled", "demo always is the bundled model"
