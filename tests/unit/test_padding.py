"""The reference path refuses models whose numbers depend on left padding."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, RwkvConfig

from tests.unit.planted import FAMILIES, build, in_memory
from zo_core.errors import UserError
from zo_core.models.load import LoadedModel
from zo_core.zo.path import choose_forward, reference_forward

SIZES = {"vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 3}
PADDED = {
    "rwkv": RwkvConfig(**SIZES, attention_hidden_size=32),
    "bart": BartConfig(
        vocab_size=8192, d_model=32, decoder_layers=3, decoder_attention_heads=4, is_decoder=True
    ),
}


def of(family: str) -> LoadedModel:
    torch.manual_seed(0)
    return in_memory(AutoModelForCausalLM.from_config(PADDED[family]).eval())


@pytest.mark.parametrize("family", sorted(PADDED))
def test_family_that_looks_at_padding_is_refused(family: str) -> None:
    with pytest.raises(UserError, match="left padding .*: it can be scanned, but not probed"):
        choose_forward(of(family), "reference", None, [])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_of_the_atlas_pass(family: str) -> None:
    assert reference_forward(in_memory(build(family))).name == "reference"
