"""Tiny random models of every family of the atlas, with or without a planted massive activation.

Where the plant sits: one token's embedding alone points along channel ``SOURCE``; one MLP unit of
one layer alone looks at that channel; a huge weight carries the unit to one output channel. So the
block output of that layer, at that token, in that channel is massive, and stays in the residual.
"""

from dataclasses import dataclass, replace

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from zo_core.models.catalog import describe
from zo_core.models.decoder import find_decoder
from zo_core.models.load import LoadedModel, load_tokenizer

LAYERS, HIDDEN, VOCABULARY = 6, 32, 8192
SOURCE, UNIT = 5, 7
STAYS = 3
"""Layers that must follow the planted one for the emergence rule."""
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
_SIZES = _COMMON | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_WITHOUT_MLP_SIZE = {k: v for k, v in _SIZES.items() if k != "intermediate_size"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT = _COMMON | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_inner": 48}
_OPT = _WITHOUT_MLP_SIZE | {"ffn_dim": 48}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "qwen2": Qwen2Config(**_SIZES, num_key_value_heads=2),
    "qwen2-moe": Qwen2MoeConfig(
        **_SIZES, **_EXPERTS, num_key_value_heads=2, shared_expert_intermediate_size=40
    ),
    "qwen3": Qwen3Config(**_SIZES, **_GROUPED),
    "qwen3-moe": Qwen3MoeConfig(**_SIZES, **_EXPERTS, **_GROUPED, mlp_only_layers=[1]),
    "mistral": MistralConfig(**_SIZES, num_key_value_heads=2),
    "mixtral": MixtralConfig(
        **_SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
    "gemma": GemmaConfig(**_SIZES, **_GROUPED),
    "gemma2": Gemma2Config(**_SIZES, **_GROUPED, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**_SIZES, **_GROUPED, query_pre_attn_scalar=8),
    "phi": PhiConfig(**_SIZES),
    "phi3": Phi3Config(**_SIZES),
    "gpt2": GPT2Config(**_GPT, n_positions=128),
    "gpt-j": GPTJConfig(**_GPT, n_positions=128, rotary_dim=4),
    "gpt-neox": GPTNeoXConfig(**_SIZES),
    "opt": OPTConfig(**_OPT, word_embed_proj_dim=HIDDEN),
    "opt-post-ln": OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "falcon": FalconConfig(**_WITHOUT_MLP_SIZE),
    "bloom": BloomConfig(**_COMMON, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4),
    "mpt": MptConfig(**_COMMON, d_model=HIDDEN, n_layers=LAYERS, n_heads=4, max_seq_len=128),
    "olmo": OlmoConfig(**_SIZES),
    "olmo2": Olmo2Config(**_SIZES),
    "starcoder2": Starcoder2Config(**_SIZES, num_key_value_heads=2),
    "granite": GraniteConfig(**_SIZES),
    "cohere": CohereConfig(**_SIZES, num_key_value_heads=2),
    "stablelm": StableLmConfig(**_SIZES, num_key_value_heads=4),
}
MOE = {"qwen2-moe", "qwen3-moe", "mixtral"}
POST_NORMS = {"gemma2": -0.99, "gemma3": -0.99, "olmo2": 0.01}
"""Families that normalise what their blocks add: there the norm's weight is the huge one. Value:
the weight of a hundredth, as the family counts it."""


@dataclass(frozen=True, slots=True)
class Plant:
    """Where a massive activation is put."""

    layer: int
    token: int
    channel: int
    weight: float = 2e4


def build(family: str, plant: Plant | None = None, seed: int = 0) -> PreTrainedModel:
    """A random float32 model whose residual stream grows by little; with or without a plant."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.normal_()
        embedding[:, SOURCE] = 0.0
        if family == "opt-post-ln":
            _project(model.model.decoder.project_in.weight, plant.channel if plant else HIDDEN - 1)
        for name, weight in model.named_parameters():
            if family in POST_NORMS and name.endswith(
                ("post_feedforward_layernorm.weight", "post_attention_layernorm.weight")
            ):
                weight.fill_(POST_NORMS[family])
        if plant is not None:
            embedding[plant.token].zero_()
            embedding[plant.token, SOURCE] = 6.0
            for name, weight in model.named_parameters():
                _plant(family, plant, name, weight)
    return model.requires_grad_(False)


def _project(weight: torch.Tensor, channel: int) -> None:
    """Let OPT's projection of the embedding [outputs, inputs] leave ``channel`` and the mean at 0.

    A norm after the residual add would else spread every token over the planted channel.
    """
    rows = [k for k in range(HIDDEN) if k not in (SOURCE, channel)]
    weight[[SOURCE, channel]] = 0.0
    weight[rows] -= weight[rows].mean(0)
    weight[:, SOURCE] = 0.0
    weight[SOURCE, SOURCE] = 1.0


INPUTS = ("gate_proj", "up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "gate_up_proj")
OUTPUTS = ("down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2", "fc_out")


def _plant(family: str, plant: Plant, name: str, weight: torch.Tensor) -> None:
    """Change one parameter, if it is one of those that make the plant."""
    at = f".{plant.layer}."
    if family == "opt-post-ln" and name.endswith(".final_layer_norm.weight"):
        if int(name.split(".")[-3]) >= plant.layer:  # or the next norm would take it away
            weight[plant.channel] = plant.weight
    elif at not in name:
        return
    module = name.partition(at)[2].removesuffix(".weight")
    normalised = family in POST_NORMS
    if module.endswith(INPUTS) and not name.endswith("bias"):
        for matrix in _matrices(family, weight):
            fused = module.endswith("gate_up_proj")
            units = (UNIT, UNIT + matrix.shape[0] // 2) if fused else (UNIT,)
            for unit in units:
                matrix[unit] = 0.0
                matrix[unit, SOURCE] = 1.0
    elif module.endswith(OUTPUTS) and not name.endswith("bias"):
        for matrix in _matrices(family, weight):
            matrix[plant.channel] = 0.0
            huge = 1.0 if normalised else 3.0 if family == "opt-post-ln" else plant.weight
            matrix[plant.channel, UNIT] = huge
    elif normalised and module == "post_feedforward_layernorm":
        weight[plant.channel] = plant.weight


def _matrices(family: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """Views [outputs, inputs] of a weight: GPT-2 stores the transpose, experts are stacked."""
    if weight.dim() == 3:
        return list(weight)
    return [weight.T if family == "gpt2" else weight] if weight.dim() == 2 else []


_demo = describe("demo")


def in_memory(model: PreTrainedModel) -> LoadedModel:
    """A model as the analyses take it, with the bundled tokenizer; nothing is written."""
    from zo_core.jobs import ModelFields

    decoder = find_decoder(model)
    return LoadedModel(
        name=type(model).__name__,
        revision=None,
        model=model,
        tokenizer=load_tokenizer(ModelFields(), _demo),
        decoder=decoder,
        device=torch.device("cpu"),
        dtype=model.dtype,
        info=replace(_demo, n_layers=len(decoder), hidden_size=HIDDEN, context=128),
    )
