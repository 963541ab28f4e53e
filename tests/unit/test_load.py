"""Loading a spoilt model: a sentence that names the model, and never random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zo_core.errors import UserError
from zo_core.jobs import ModelFields
from zo_core.models.catalog import DEMO_PATH
from zo_core.models.load import load

Change = Callable[[Path], None]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be spoilt."""
    for file in DEMO_PATH.iterdir():
        if file.suffix in {".json", ".safetensors"}:
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def cut_weights(folder: Path) -> None:
    """As a download that stopped: the header is whole, the data is not."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def rewrite(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Store other tensors."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


def configure(**changes: object) -> Change:
    """Another config.json."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    "spoil",
    [
        cut_weights,
        rewrite(lambda t: {n: v for n, v in t.items() if ".3.mlp." not in n}),
        rewrite(lambda t: {n.replace("model.", "other."): v for n, v in t.items()}),
        configure(num_hidden_layers=18),
        configure(model_type="bert", architectures=["BertLMHeadModel"]),
        configure(hidden_size=128),
        configure(vocab_size=100),
        configure(model_type="unheard-of"),
        without_tokenizer,
        broken_tokenizer,
    ],
    ids=[
        "weights cut short",
        "layer without weights",
        "other names",
        "more layers than weights",
        "another family",
        "another width",
        "another vocabulary",
        "unknown family",
        "no tokenizer",
        "broken tokenizer",
    ],
)
def test_spoilt_folder_is_refused_by_name(copied: Path, spoil: Change) -> None:
    spoil(copied)
    with pytest.raises(UserError) as caught:
        load(ModelFields(model=str(copied), device="cpu"))
    sentence = str(caught.value)
    assert sentence.startswith(f"model: {copied} ")
    assert "\n" not in sentence


def test_sound_copy_is_the_same_model(copied: Path) -> None:
    ours = load(ModelFields(model=str(copied), device="cpu", dtype="float32"))
    demo = load(ModelFields(device="cpu", dtype="float32"))
    weights = dict(demo.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert not parameter.requires_grad
    assert not ours.model.training
    assert ours.context == 512


def test_gpu_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(UserError, match="device: cuda is not here: choose auto or cpu"):
        load(ModelFields(device="cuda"))
