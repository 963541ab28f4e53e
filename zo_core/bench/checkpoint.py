"""Write a checkpoint of a published shape: random weights with a planted massive activation.

Sharded safetensors as the hub has them, one decoder block in memory at a time. Where the plant
sits: one token's embedding alone points along one channel; one MLP unit of one layer alone looks at
that channel; its column of the down-projection has a single large weight, to the planted output
channel.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from zo_core.models.catalog import DEMO_PATH
from zo_core.models.decoder import find_decoder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SOURCE, UNIT = 5, 7
SHARD = 1 << 31
"""Bytes of a file, about."""
STD, WRITING_STD = 0.02, 0.002
"""Of weights, and of those that write into the residual stream: it grows slowly, as in a trained
model."""
TARGET = 2400.0
"""Magnitude aimed at: that of LLaMA2-7B."""


@dataclass(frozen=True, slots=True)
class Planted:
    """Where the massive activation is."""

    layer: int
    token: int
    channel: int


def write_checkpoint(
    config: PreTrainedConfig,
    folder: Path,
    planted: Planted,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda _line: None,
) -> int:
    """Write config, tokenizer and weights; returns the bytes of the weights.

    Args:
        config: of a family with gate, up and down projections, such as Llama or Qwen3.
        folder: made if it is not there.
        planted: the massive activation.
        dtype: of the weights.
        device: that draws them.
        say: receives a line for every file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    prefix = find_decoder(model).prefix
    generator = torch.Generator(device).manual_seed(0)
    waiting: dict[str, torch.Tensor] = {}
    files: list[tuple[Path, list[str]]] = []
    total = 0

    def flush() -> None:
        if waiting:
            path = folder / f"part-{len(files)}.safetensors"
            save_file(waiting, path, metadata={"format": "pt"})
            say(f"wrote {len(waiting)} tensors")
            files.append((path, list(waiting)))
            waiting.clear()

    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        weight = _draw(name, tensor, generator, device)
        _plant(name, weight, prefix, planted)
        waiting[name] = weight.to("cpu")
        total += weight.nbytes
        if sum(t.nbytes for t in waiting.values()) >= SHARD:
            flush()
    flush()
    _name_files(folder, files, total)
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copyfile(DEMO_PATH / file, folder / file)
    return total


def _draw(
    name: str, like: torch.Tensor, generator: torch.Generator, device: torch.device | str
) -> torch.Tensor:
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=like.dtype, device=device)
    weight = torch.empty(like.shape, dtype=like.dtype, device=device)
    std = (
        1.0 if "embed" in name else WRITING_STD if "down_proj" in name or "o_proj" in name else STD
    )
    return weight.normal_(0.0, std, generator=generator)


def _plant(name: str, weight: torch.Tensor, prefix: str, planted: Planted) -> None:
    if "embed" in name:
        weight[:, SOURCE] = 0.0
        weight[planted.token] = 0.0
        weight[planted.token, SOURCE] = 16.0
    if not name.startswith(f"{prefix}.{planted.layer}.mlp."):
        return
    if "gate_proj" in name or "up_proj" in name:
        weight[UNIT] = 0.0
        weight[UNIT, SOURCE] = 1.0
    elif "down_proj" in name:
        # The normed input of the planted token is sqrt(H) along the source: the unit is H.
        weight[planted.channel] = 0.0
        weight[planted.channel, UNIT] = TARGET / weight.shape[0]


def _name_files(folder: Path, files: list[tuple[Path, list[str]]], total: int) -> None:
    """Give the files the names and the index that the hub's have."""
    index: dict[str, str] = {}
    for number, (path, names) in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        path.rename(folder / file)
        index |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)


def random_rows(count: int, length: int, planted: Planted, seed: int = 0) -> Iterator[list[int]]:
    """Token rows that begin with the planted token, as texts begin with BOS."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        row = torch.randint(2, 8000, (length,), generator=generator)
        row[row == planted.token] += 1
        row[0] = planted.token
        yield row.tolist()
