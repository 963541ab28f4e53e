"""Models and batches of the step benchmark: published shapes with random weights."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from zo_core.errors import UserError
from zo_core.jobs import ModelFields
from zo_core.models.catalog import describe
from zo_core.models.decoder import find_decoder
from zo_core.models.load import LoadedModel, load, pick_device, pick_dtype
from zo_core.tasks.catalog import find_task
from zo_core.tasks.data import load_task
from zo_core.tasks.templates import Candidate, Example, encode_rows

SHAPES: dict[str, tuple[PreTrainedConfig | None, int]] = {
    "llama2-7b": (
        LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=4096,
        ),
        1,
    ),
    "qwen3-8b": (
        Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
        ),
        6,
    ),
    "demo": (None, 8),
}
"""Configuration, and the layer that is tuned: the dominant one of the paper, or of an analysis."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt lengths of a task in tokens, as drawn where its rows are absent."""

    mean: float
    longest: int
    answer: int
    """Tokens of an answer."""


LENGTHS = {
    "copa": Lengths(14, 22, 5),
    "sst2": Lengths(25, 41, 1),
    "wsc": Lengths(49, 89, 1),
    "cb": Lengths(87, 259, 1),
    "drop": Lengths(308, 528, 3),
}


def build(shape: str, device: str = "auto", dtype: str = "auto") -> tuple[LoadedModel, int]:
    """A model of a shape, with random weights unless it is the demo, and its tuned layer.

    Raises:
        UserError: the shape is unknown.
    """
    if shape not in SHAPES:
        raise UserError(f"shape: {shape!r} is unknown: choose one of {', '.join(SHAPES)}.")
    config, layer = SHAPES[shape]
    demo = load(ModelFields.model_validate({"device": device, "dtype": dtype}))
    if config is None:
        return demo, layer
    place = pick_device(device)
    precision = pick_dtype(dtype, place)
    torch.manual_seed(0)
    with torch.device(place):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=precision)
    model.eval().requires_grad_(False)
    decoder = find_decoder(model)
    info = replace(
        describe("demo"),
        architecture=type(model).__name__,
        n_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        layer_parameters=sum(p.numel() for p in decoder.blocks[layer].parameters()),
        context=config.max_position_embeddings,
    )
    loaded = LoadedModel(
        name=shape,
        revision=None,
        model=model,
        tokenizer=demo.tokenizer,
        decoder=decoder,
        device=place,
        dtype=precision,
        info=info,
    )
    return loaded, layer


def examples(
    task: str, loaded: LoadedModel, count: int, data_dir: Path | None
) -> tuple[list[Example], str]:
    """Training examples of a task and where they come from: real rows, or drawn lengths.

    Raises:
        UserError: the task has neither rows here nor stated lengths.
    """
    try:
        data = load_task(task, data_dir, count, 1, 0)
        rows = data.train[:count]
        encoded = encode_rows(data.task, rows, loaded.tokenizer, loaded.context, training=True)
        return encoded, f"{len(encoded)} real rows, tokenizer of the bundled model"
    except UserError:
        if task not in LENGTHS:
            raise
    drawn = _drawn(task, count)
    return drawn, f"{len(drawn)} drawn lengths, {LENGTHS[task]}"


def _drawn(task: str, count: int) -> list[Example]:
    generator = random.Random(0)  # noqa: S311 - a reproducible draw
    lengths, info = LENGTHS[task], find_task(task)
    options = 1 if info.loss == "gold" else len(info.candidates)
    found = []
    for _ in range(count):
        length = int(generator.gammavariate(4.0, lengths.mean / 4.0))
        length = min(max(length, 4), lengths.longest)
        prompt = tuple(generator.randrange(2, 8000) for _ in range(length))
        answers = [
            tuple(generator.randrange(2, 8000) for _ in range(lengths.answer))
            for _ in range(options)
        ]
        found.append(
            Example(
                candidates=tuple(Candidate(prompt + a, length) for a in answers),
                label=0,
                truncated=False,
            )
        )
    return found
