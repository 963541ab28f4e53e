"""Tiny random models of many families, saved as real folders, some with a planted outlier.

Where the plant sits: one token's embedding alone points along channel ``SOURCE``; one MLP unit of
one layer alone looks at that channel; a huge weight carries the unit to one output channel. So the
block output of that layer, at that token, in that channel is massive, and stays in the residual.
"""

import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from zo_core.models.catalog import DEMO_PATH

LAYERS, HIDDEN, VOCABULARY = 6, 32, 8192
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SOURCE, UNIT = 5, 7
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
_SIZES = _COMMON | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**_SIZES, **_GROUPED),
    "gemma2": Gemma2Config(**_SIZES, **_GROUPED, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        **_COMMON, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_inner=48, n_positions=128
    ),
    "opt": OPTConfig(
        **{k: v for k, v in _SIZES.items() if k != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=HIDDEN,
    ),
    "gpt_neox": GPTNeoXConfig(**_SIZES),
    "phi": PhiConfig(**_SIZES),
}


@dataclass(frozen=True, slots=True)
class Plant:
    """Where a massive activation is put."""

    layer: int
    token: int
    channel: int
    weight: float


def build(family: str, plant: Plant | None = None, seed: int = 0) -> PreTrainedModel:
    """A random float32 model whose residual stream grows by little; with or without a plant."""
    torch.manual_seed(seed)
    # A copy: whoever gives the model another dtype writes it into its configuration.
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[family])).eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.normal_()
        embedding[:, SOURCE] = 0.0
        if plant is not None:
            embedding[plant.token].zero_()
            embedding[plant.token, SOURCE] = 6.0
            _plant(model, family, plant)
    return model


INPUTS = ("mlp.gate_proj", "mlp.up_proj", "mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc1", "fc1")
OUTPUTS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2")


def _plant(model: PreTrainedModel, family: str, plant: Plant) -> None:
    # Gemma-2 normalises what its blocks add: there the norm's weight is the huge one.
    normalised = family == "gemma2"
    for name, weight in model.named_parameters():
        if normalised and name.endswith(
            ("post_feedforward_layernorm.weight", "post_attention_layernorm.weight")
        ):
            weight.fill_(-0.99)  # its weights count from 1
        if f".{plant.layer}." not in name:
            continue
        # GPT-2's Conv1D holds [in, out].
        matrix = weight.T if family == "gpt2" and weight.dim() == 2 else weight
        module = name.partition(f".{plant.layer}.")[2].removesuffix(".weight")
        if module in INPUTS:
            matrix[UNIT] = 0.0
            matrix[UNIT, SOURCE] = 1.0
        elif module in OUTPUTS:
            matrix[plant.channel] = 0.0
            matrix[plant.channel, UNIT] = 1.0 if normalised else plant.weight
        elif normalised and module == "post_feedforward_layernorm":
            weight[plant.channel] = plant.weight


def save(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    """The model as a folder that loads, with the bundled tokenizer's files."""
    model.save_pretrained(folder, **options)
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO_PATH / name, folder / name)
    return folder
