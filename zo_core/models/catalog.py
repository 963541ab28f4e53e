"""What a model is, read from ``config.json`` and safetensors headers alone: no torch, no loading.

A model is named by ``demo`` (bundled), a local folder, or a hub id with an optional revision.
"""

import json
import re
import struct
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from zo_core.errors import UserError

DEMO_PATH = Path(__file__).resolve().parent / "demo"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
OTHER_WEIGHTS = re.compile(r"consolidated|adapter_")
EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
BUFFER = re.compile(r"\.attn\.(masked_)?bias$")
"""GPT-2's stored causal masks: in the file, but no parameters."""
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


_NO_MODEL = (
    "model: no folder {!r} here, and it is no hub id: give demo, an existing folder, or an id such "
    "as Qwen/Qwen3-8B."
)


class ModelError(UserError):
    """The named model cannot be read."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Architecture and size of a model. Sizes count values, not bytes."""

    source: Literal["bundled", "local", "hub"]
    path: str
    architecture: str
    model_type: str
    n_layers: int
    hidden_size: int
    intermediate_size: int | None
    n_heads: int | None
    n_kv_heads: int | None
    vocab_size: int
    context: int | None
    tied_embeddings: bool
    stored_dtype: str
    parameters: int
    layer_parameters: int
    has_bos: bool | None
    config: dict[str, Any]


def resolve(model: str) -> tuple[Literal["bundled", "local", "hub"], str]:
    """Tell the bundled model, a local folder and a hub id apart.

    Returns:
        (source, folder or hub id), as ``from_pretrained`` takes it.

    Raises:
        ModelError: neither a folder that is there nor a well-formed hub id.
    """
    if model == "demo":
        return "bundled", str(DEMO_PATH)
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, or an unknown ~user
        raise ModelError(_NO_MODEL.format(model[:80])) from error
    if is_folder:
        if not (folder / "config.json").is_file():
            raise ModelError(f"model: {model} is no model folder: it has no config.json.")
        return "local", str(folder)
    if exists:
        raise ModelError(f"model: {model} is a file: give the folder that holds config.json.")
    if HUB_ID.match(model) and not model.startswith((".", "~")):
        return "hub", model
    raise ModelError(_NO_MODEL.format(model))


def describe(model: str, revision: str | None = None) -> ModelInfo:
    """Read a model's architecture without loading it.

    A hub model costs two small requests unless it is in the local hub cache.

    Raises:
        ModelError: unknown model, no safetensors weights, unreadable files, or the hub is out of
            reach.
    """
    source, where = resolve(model)
    if source == "hub":
        config, shapes, tokenizer = _read_hub(where, revision)
    else:
        folder = Path(where)
        config = _read_json(folder / "config.json")
        tokenizer_file = folder / "tokenizer_config.json"
        tokenizer = _read_json(tokenizer_file) if tokenizer_file.is_file() else None
        shapes = _folder_shapes(folder)
    return _summarise(source, where, config, shapes, tokenizer)


Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (stored dtype, shape)."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"model: cannot read {path}: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"model: {path} does not hold a JSON object.")
    return value


def _folder_shapes(folder: Path) -> Shapes:
    files = weight_files(folder)
    if not files:
        pickles = any(folder.glob("*.bin"))
        hint = "only pickle weights (.bin): convert them to safetensors" if pickles else "none"
        raise ModelError(f"model: {folder} needs *.safetensors weights and has {hint}.")
    shapes: Shapes = {}
    for file in files:
        own = _header_shapes(file)
        lacking = sorted(_indexed(folder).get(file.name, set()) - set(own))
        if lacking:
            raise ModelError(
                f"model: {folder} cannot be loaded: {file.name} lacks {lacking[0]}, which the "
                "index looks for there: a file of another model, or a download that went wrong."
            )
        shapes |= own
    return shapes


def _indexed(folder: Path) -> dict[str, set[str]]:
    """File name -> tensors that the index looks for in it."""
    index = folder / "model.safetensors.index.json"
    found: dict[str, set[str]] = defaultdict(set)
    if index.is_file():
        for name, file in _read_json(index).get("weight_map", {}).items():
            found[file].add(name)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained`` reads: the index's, else the single one, else all.

    Raises:
        ModelError: one that the index names is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"model: {folder} lacks {missing[0]}, which its index names.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    return sorted(f for f in folder.glob("*.safetensors") if not OTHER_WEIGHTS.match(f.name))


def _header_shapes(file: Path) -> Shapes:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(file.stat().st_size, 100_000_000):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
        shapes = {name: (e["dtype"], tuple(e["shape"])) for name, e in header.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model: {file} is no readable safetensors file: {error}.") from error
    size = file.stat().st_size
    if size < end:
        raise ModelError(
            f"model: {file.parent} cannot be loaded: {file.name} has {size} of {end} bytes: "
            "download it again."
        )
    return shapes


def _read_hub(
    model: str, revision: str | None
) -> tuple[dict[str, Any], Shapes, dict[str, Any] | None]:
    # Imported here: the bundled model must not pay for it.
    from huggingface_hub import (
        HfApi,
        get_safetensors_metadata,
        hf_hub_download,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    if isinstance(cached, str) and weight_files(Path(cached).parent):
        folder = Path(cached).parent
        tokenizer_file = folder / "tokenizer_config.json"
        tokenizer = _read_json(tokenizer_file) if tokenizer_file.is_file() else None
        return _read_json(Path(cached)), _folder_shapes(folder), tokenizer
    try:
        # This request is not retried, so being offline shows in a second, not half a minute.
        HfApi().model_info(model, revision=revision, timeout=10)
        config = _read_json(Path(hf_hub_download(model, "config.json", revision=revision)))
        metadata = get_safetensors_metadata(model, revision=revision)
        shapes = {
            name: (str(info.dtype), tuple(info.shape))
            for file in metadata.files_metadata.values()
            for name, info in file.tensors.items()
        }
        try:
            path = hf_hub_download(model, "tokenizer_config.json", revision=revision)
            tokenizer = _read_json(Path(path))
        except EntryNotFoundError:
            tokenizer = None
    except ModelError:
        raise
    except HfHubHTTPError as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"model: the hub has no public model {model!r}{at} with config.json and safetensors "
            f"weights ({type(error).__name__})."
        ) from error
    except Exception as error:  # the hub client raises many kinds when there is no network
        raise ModelError(
            f"model: the hub is out of reach and {model!r} is not in the local hub cache: choose "
            f"demo or a local folder, or go online ({type(error).__name__})."
        ) from error
    return config, shapes, tokenizer


def _layer_sizes(shapes: Shapes) -> list[int]:
    """Parameters of each decoder layer: the numbered group that holds most of the weights."""
    groups: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for name, (_, shape) in shapes.items():
        match = re.match(r"(.*?)\.(\d+)\.", name)
        if match:
            groups[match[1]][int(match[2])] += prod(shape)
    largest = max(groups.values(), key=lambda group: sum(group.values()), default={})
    return [largest[i] for i in sorted(largest)]


def _summarise(
    source: Literal["bundled", "local", "hub"],
    path: str,
    config: dict[str, Any],
    shapes: Shapes,
    tokenizer: dict[str, Any] | None,
) -> ModelInfo:
    text = {**config, **config.get("text_config", {})}
    shapes = {name: entry for name, entry in shapes.items() if not BUFFER.search(name)}

    def first(*names: str) -> Any:
        value = next((text[n] for n in names if text.get(n) is not None), None)
        return max(value) if isinstance(value, list) else value

    layers = _layer_sizes(shapes)
    dtypes: dict[str, int] = defaultdict(int)
    for dtype, shape in shapes.values():
        dtypes[dtype] += prod(shape)
    stored = max(dtypes, key=lambda d: dtypes[d], default="")
    n_heads = first("num_attention_heads", "n_head", "n_heads")
    table = next((shape for name, (_, shape) in shapes.items() if EMBEDDING.search(name)), None)
    rows, columns = table or (None, None)
    hidden = first("hidden_size", "n_embd", "n_embed", "d_model") or columns
    vocab = first("vocab_size") or rows
    if not layers or hidden is None or vocab is None:
        raise ModelError(
            f"model: {path} does not look like a causal language model: config.json needs "
            "hidden_size and vocab_size, and the weights a numbered list of decoder layers."
        )
    return ModelInfo(
        source=source,
        path=path,
        architecture=(config.get("architectures") or ["unknown"])[0],
        model_type=str(config.get("model_type", "unknown")),
        n_layers=int(first("num_hidden_layers", "n_layer", "n_layers") or len(layers)),
        hidden_size=int(hidden),
        intermediate_size=first("intermediate_size", "n_inner", "ffn_dim"),
        n_heads=n_heads,
        n_kv_heads=first("num_key_value_heads", "num_kv_heads") or n_heads,
        vocab_size=int(vocab),
        context=first("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
        tied_embeddings=bool(text.get("tie_word_embeddings", False)),
        stored_dtype=STORED_DTYPES.get(stored, stored),
        parameters=sum(prod(shape) for _, shape in shapes.values()),
        layer_parameters=max(layers),
        has_bos=None if tokenizer is None else bool(tokenizer.get("bos_token")),
        config=config,
    )
