"""Families outside the atlas's list: their blocks and parts are found by structure, too."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    PhimoeConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    XGLMConfig,
)

from tests.unit.planted import in_memory
from zo_core.analysis.activations import ActivationScan
from zo_core.analysis.observe import PARTS

_SIZES = {"vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 3}
_HEADS = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_MOE = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
BLOCK, ATTENTION, MLP, DOWN = PARTS
OTHERS: dict[str, tuple[PreTrainedConfig, set[str], int]] = {
    "gpt-neo": (
        GPTNeoConfig(
            vocab_size=8192,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
        ),
        set(PARTS),
        2,
    ),
    "gpt-oss": (
        GptOssConfig(**_HEADS, **_MOE, layer_types=["full_attention"] * 3),
        set(PARTS),
        12,
    ),
    "phi-moe": (PhimoeConfig(**_HEADS, **_MOE), set(PARTS), 12),
    "jamba": (
        JambaConfig(
            **_SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            use_mamba_kernels=False,
        ),
        set(PARTS),
        6,
    ),
    "lfm2": (
        Lfm2Config(
            **_SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            layer_types=["conv", "full_attention", "conv"],
        ),
        set(PARTS),
        3,
    ),
    "llama4": (
        Llama4TextConfig(**_HEADS, **_MOE, intermediate_size_mlp=48, pad_token_id=0),
        {BLOCK, ATTENTION, MLP},
        0,
    ),
    "mamba": (MambaConfig(**_SIZES, state_size=8), {BLOCK, ATTENTION}, 0),
    "recurrent-gemma": (
        RecurrentGemmaConfig(**_SIZES, num_attention_heads=4, intermediate_size=96, lru_width=32),
        set(PARTS),
        3,
    ),
    "rwkv": (RwkvConfig(**_SIZES, attention_hidden_size=32), {BLOCK, ATTENTION, MLP}, 0),
    "xglm": (
        XGLMConfig(vocab_size=8192, d_model=32, num_layers=3, attention_heads=4, ffn_dim=48),
        set(PARTS),
        3,
    ),
}
"""Configuration, the parts that every block has, and the number of down-projections."""


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_parts_are_found(family: str) -> None:
    config, parts, projections = OTHERS[family]
    torch.manual_seed(0)
    loaded = in_memory(AutoModelForCausalLM.from_config(config).eval())
    scan = ActivationScan(loaded)
    scan.run([[9, 17, 23, 31, 45], [7, 8, 9]], batch_size=2)
    table = scan.parts()
    for layer in range(len(loaded.decoder)):
        found = table[table["layer"] == layer]
        assert set(found["part"]) == parts
        assert (found["nonfinite"] == 0).all()
        whole = found.set_index("part")["count"]
        assert (whole.drop(DOWN, errors="ignore") == 8 * 32).all()
    assert len(scan.weights()) == projections
    assert set(scan.owl()["layer"]) == set(range(len(loaded.decoder)))
