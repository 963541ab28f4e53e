"""The table of published models: well-formed, and recognised by id and by configuration."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from zo_core.analysis.known import KNOWN, KnownModel, answers, recognise
from zo_core.analysis.outliers import RULES
from zo_core.models.catalog import ModelInfo, describe

BY_NAME = {known.name: known for known in KNOWN}
FACTS = {
    "LLaMA2-7B": (1, 1),
    "LLaMA2-13B": (3, 3),
    "LLaMA3-8B": (1, 1),
    "Llama-3.2-1B": (1, 1),
    "Llama-3.2-3B": (1, 1),
    "Mistral-7B": (1, 1),
    "Mixtral-8x7B": (1, 1),
    "Falcon-7B": (3, 3),
    "Falcon-11B": (2, 2),
    "Phi-2": (1, 2),
    "Phi-4": (1, 1),
    "OPT-6.7B": (0, 0),
    "GPT-2 (small)": (2, 2),
    "OLMo-7B-0724": (1, 1),
    "OLMo-2-7B": (None, None),
    "Gemma-7B": (None, 0),
    "Gemma-2-2B": (None, 4),
    "Gemma-2-9B": (None, 0),
    "Gemma-3-1B": (0, 0),
    "Gemma-3-4B": (0, 0),
    "Gemma-3-12B": (0, 0),
    "Phi-3-mini": (2, 2),
    "Qwen3-8B": (6, 6),
}
"""Published first layer without BOS, and with it."""


@pytest.mark.parametrize(("name", "layers"), FACTS.items())
def test_published_layer_with_and_without_bos(
    name: str, layers: tuple[int | None, int | None]
) -> None:
    for with_bos, layer in zip((False, True), layers, strict=True):
        (answer,) = answers(BY_NAME[name], with_bos)
        assert answer.layer == layer
        assert answer.rule in RULES
        assert f"published: {'none' if layer is None else f'layer {layer}'}" in answer.sentence
        assert answer.source in answer.sentence


def test_every_model_is_in_the_facts_once() -> None:
    assert list(BY_NAME) == [known.name for known in KNOWN]
    assert set(BY_NAME) == set(FACTS)
    ids = [hub_id.lower() for known in KNOWN for hub_id in known.hub_ids]
    assert len(ids) == len(set(ids))


def info_of(known: KnownModel) -> ModelInfo:
    """A model description with the shape of a known model, and otherwise of the bundled one."""
    return replace(describe("demo"), source="local", **known.shape)


@pytest.mark.parametrize("known", KNOWN, ids=lambda k: k.name)
def test_shapes_tell_the_models_apart(known: KnownModel) -> None:
    assert [k.name for k in KNOWN if k.has_shape_of(info_of(known))] == [known.name]
    match = recognise("/models/mine", info_of(known))
    assert match is not None
    assert (match.known, match.by) == (known, "configuration")
    deeper = replace(info_of(known), n_layers=known.shape["n_layers"] + 1)
    assert recognise("/models/mine", deeper) is None


def test_hub_ids_are_recognised_without_a_configuration() -> None:
    match = recognise("Meta-Llama/llama-2-7B-hf")
    assert match is not None
    assert (match.known.name, match.by) == ("LLaMA2-7B", "hub id")
    assert recognise("someone/else") is None
    assert recognise("demo", describe("demo")) is None


def test_layer_numbers_exist_in_their_models() -> None:
    for known in KNOWN:
        for answer in known.published:
            assert answer.layer is None or answer.layer < int(known.shape["n_layers"])
            assert all(c < int(known.shape["hidden_size"]) for c in answer.channels)


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_is_recognised_by_its_config_json(tmp_path: Path, nested: bool) -> None:
    """As transformers writes it: of Gemma-3-4B the text model's sizes are nested."""
    from safetensors.numpy import save_file

    sizes = {"num_hidden_layers": 34, "hidden_size": 2560, "vocab_size": 262208}
    llama = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    config = {"model_type": "gemma3", "text_config": sizes} if nested else llama
    (tmp_path / "config.json").write_text(json.dumps(config))
    import numpy as np

    save_file({"model.layers.0.w.weight": np.zeros((2, 2), "f4")}, tmp_path / "model.safetensors")
    match = recognise(str(tmp_path), describe(str(tmp_path)))
    assert match is not None
    assert match.known.name == ("Gemma-3-4B" if nested else "LLaMA2-7B")
