"""A model whose decoder blocks come from its safetensors files one at a time.

The architecture is built without memory for weights; what lies outside the blocks (embeddings,
norms) is loaded once, a block's weights when it is its turn, through the same conversions that
``from_pretrained`` applies. A forward pass runs one block: the model's own code leads up to it with
all earlier blocks standing aside, so that masks and positions are made as ever, the given hidden
states go in, and it ends there.
"""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from zo_core.jobs import ModelFields
from zo_core.models.catalog import ModelError, describe, weight_files
from zo_core.models.decoder import find_decoder, hidden_of
from zo_core.models.load import (
    UNREADABLE,
    LoadedModel,
    cannot_be_loaded,
    check_same_past,
    load_tokenizer,
    pick_device,
    pick_dtype,
)


class BlockwiseModel:
    """A causal LM on a device with at most one decoder block's weights in memory."""

    def __init__(self, fields: ModelFields) -> None:
        """Build the architecture and load what is outside the decoder blocks.

        Raises:
            ModelError: the model cannot be found or read; names the file.
            UserError: its decoder blocks cannot be found.
        """
        device = pick_device(fields.device)
        dtype = pick_dtype(fields.dtype, device)
        info = describe(fields.model, fields.revision)
        transformers_logging.disable_progress_bar()
        self._name, self._folder = fields.model, _folder(fields, info.path)
        tokenizer = load_tokenizer(fields, info)
        try:
            config = AutoConfig.from_pretrained(self._folder, trust_remote_code=False)
            if getattr(config, "quantization_config", None) is not None:
                raise ValueError("its weights are quantized: choose placement resident")
            with _without_weights():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except UNREADABLE as error:
            raise cannot_be_loaded(fields.model, error) from error
        model.eval()
        self.loaded = LoadedModel(
            name=fields.model,
            revision=fields.revision,
            model=model,
            tokenizer=tokenizer,
            decoder=find_decoder(model),
            device=device,
            dtype=dtype,
            info=info,
        )
        """Its blocks hold no weights outside :meth:`block`."""
        self._weights: Any = model
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
        )
        self._files = self._find_keys()
        self._returned = 0
        """Entries of the tuple that a block returns; 0: it returns a tensor."""
        outside = model.base_model
        self._load(None)
        for module in outside.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._check_outside(outside)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.loaded.decoder)

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """Within, a block has its weights; the files of the next one are read ahead.

        Raises:
            ModelError: its files lack a weight or cannot be read; names the file.
        """
        block = self.loaded.decoder.blocks[layer]
        self._load(layer)
        reader = Thread(target=self._read_ahead, args=(layer + 1,), daemon=True)
        reader.start()
        try:
            yield block
        finally:
            for module in block.modules():
                for name, weight in module._parameters.items():
                    if weight is not None:
                        empty = torch.empty_like(weight, device="meta")
                        module._parameters[name] = nn.Parameter(empty, requires_grad=False)
            reader.join()

    @torch.no_grad()
    def run(
        self, layer: int, input_ids: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Output [B, T, H] of a block, whose weights are there, for its input [B, T, H].

        Args:
            layer: 0-based.
            input_ids: int64 [B, T].
            hidden: output of the block before; None for layer 0.
        """
        blocks = self.loaded.decoder.blocks

        def enter(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if hidden is None:
                return args, kwargs
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        def leave(_module: nn.Module, _args: Any, output: object) -> None:
            self._returned = len(output) if isinstance(output, tuple | list) else 0
            raise _Left(hidden_of(output))

        for block in blocks[:layer]:
            block.forward = partial(_stand_aside, returned=self._returned)
        handles = [
            blocks[layer].register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            blocks[layer].register_forward_hook(leave),  # after all others
        ]
        try:
            self.loaded.model.base_model(input_ids=input_ids, use_cache=False)  # type: ignore[operator]
        except _Left as left:
            return left.hidden
        finally:
            for handle in handles:
                handle.remove()
            for block in blocks[:layer]:
                del block.forward  # uncovers the class's own
        raise AssertionError(f"the model never reached layer {layer}")

    @torch.no_grad()
    def check_causal(self) -> None:
        """Refuse a model whose block 0, whose weights are there, looks to the right.

        Raises:
            UserError: it does.
        """
        tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=self.loaded.device)
        check_same_past(self._name, self.run(0, tokens))

    def _find_keys(self) -> dict[int | None, dict[Path, list[str]]]:
        """Layer, or None for what is outside the blocks -> file -> names of tensors in it."""
        mapping = self._config.weight_mapping or []
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        state = self._weights.state_dict()
        prefix, base = f"{self.loaded.decoder.prefix}.", self._weights.base_model_prefix
        found: dict[int | None, dict[Path, list[str]]] = {}
        for file in weight_files(Path(self._folder)):
            with _opened(self._name, file) as stream:
                names = list(stream.keys())
            for name in names:
                target, _ = rename_source_key(name, renamings, converters, base, state)
                if hasattr(self._weights, base) and not target.startswith(f"{base}."):
                    continue  # the head: no scan needs logits
                rest = target.removeprefix(prefix) if target.startswith(prefix) else ""
                number = rest.partition(".")[0]
                layer = int(number) if number.isdigit() else None
                found.setdefault(layer, {}).setdefault(file, []).append(name)
        return found

    def _load(self, layer: int | None) -> None:
        """Give a block, or what is outside all of them, its weights."""
        slices: dict[str, Any] = {}
        streams = []
        files = self._files.get(layer, {})
        try:
            for file, names in files.items():
                stream = safe_open(file, framework="pt")
                streams.append(stream)
                slices |= {name: stream.get_slice(name) for name in names}
            loaded, _ = convert_and_load_state_dict_in_model(
                self._weights, slices, self._config, None
            )
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPU" in str(error):
                raise
            raise cannot_be_loaded(f"{self._name} ({_names(files)})", error) from error
        finally:
            for stream in streams:
                stream.__exit__(None, None, None)
        self._check(layer, files, loaded)

    def _check(self, layer: int | None, files: dict[Path, list[str]], loaded: Any) -> None:
        where = f"{self._name} ({_names(files)})"
        for name, stored, wanted in sorted(loaded.mismatched_keys):
            raise ModelError(
                f"model: {where} cannot be loaded: {name} is {tuple(stored)} in the file and "
                f"{tuple(wanted)} by config.json."
            )
        for name, message in loaded.conversion_errors.items():
            first = str(message).strip().partition("\n")[0]
            raise ModelError(f"model: {where} cannot be loaded: {name}: {first}")
        if layer is not None:
            block = self.loaded.decoder.blocks[layer]
            for name, weight in block.named_parameters():
                if weight.is_meta:
                    raise ModelError(
                        f"model: {where} cannot be loaded: its files lack {name} of layer {layer}."
                    )

    def _check_outside(self, outside: nn.Module) -> None:
        inside = {id(p) for block in self.loaded.decoder.blocks for p in block.parameters()}
        for name, weight in outside.named_parameters():
            if weight.is_meta and id(weight) not in inside:
                raise ModelError(f"model: {self._name} cannot be loaded: its files lack {name}.")

    def _read_ahead(self, layer: int) -> None:
        """Bring the files of a block into the system's cache while another one computes."""
        for file, names in self._files.get(layer, {}).items():
            with suppress(OSError, ValueError, KeyError), file.open("rb") as stream:
                start, end = _span(stream, names)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(stream.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)


class _Left(Exception):  # noqa: N818 - a signal, not an error
    """Carries the hidden states out of a forward pass that need not go on."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stand_aside(hidden_states: torch.Tensor, *_args: Any, returned: int, **_kwargs: Any) -> object:
    """Stand-in for the forward of a block that is not here."""
    return (hidden_states, *[None] * (returned - 1)) if returned else hidden_states


@contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters of modules made within are on the meta device; buffers, as computed, are not."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        register(module, name, weight)
        if weight is not None:
            module._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _folder(fields: ModelFields, path: str) -> str:
    """The local folder of a model; a hub model is downloaded, if it is not in the hub cache."""
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            path,
            revision=fields.revision,
            allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"],
        )
    except Exception as error:  # the hub client raises many kinds when there is no network
        raise cannot_be_loaded(fields.model, error) from error


@contextmanager
def _opened(model: str, file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stream:
            yield stream
    except (OSError, SafetensorError) as error:
        raise cannot_be_loaded(f"{model} ({file.name})", error) from error


def _names(files: dict[Path, list[str]]) -> str:
    return ", ".join(file.name for file in files) or "no file"


def _span(stream: BinaryIO, names: list[str]) -> tuple[int, int]:
    """First and last byte of some tensors in a safetensors file."""
    (length,) = struct.unpack("<Q", stream.read(8))
    header = json.loads(stream.read(length))
    places = [header[name]["data_offsets"] for name in names]
    return 8 + length + min(a for a, _ in places), 8 + length + max(b for _, b in places)
