"""Tuned tensors as one safetensors file, with its facts inside and in a manifest beside it."""

import io
import json
from pathlib import Path
from typing import Any, BinaryIO

from zo_core.artifacts.raw import build_header, pieces, read_header, sha256
from zo_core.artifacts.source import Source, facts, installed, written
from zo_core.runs import to_json

FACTS = "zoscope"
"""Key of the file's metadata that holds the facts, as JSON."""


def write_tensors(source: Source, stream: BinaryIO) -> dict[str, Any]:
    """Write the tuned tensors; gives their facts.

    The tensors are the run's true weights: float32, or the working dtype with precision inplace.
    """
    manifest = facts(source, "tensors")
    with source.path.open("rb") as file:
        # The file's own offsets: it may have been replaced since it was looked at.
        stored = {n: t for n, t in read_header(file)[1].items() if n in source.tensors}
        head = build_header(tensors_metadata(manifest), stored)
        stream.write(head)
        for tensor in stored.values():
            for piece in pieces(file, tensor):
                stream.write(piece)
    return manifest


def tensors_bytes(source: Source) -> bytes:
    """The file, for a download."""
    buffer = io.BytesIO()
    write_tensors(source, buffer)
    return buffer.getvalue()


def tensors_metadata(manifest: dict[str, Any]) -> dict[str, str]:
    """The metadata of a tensors file."""
    return {"format": "pt", FACTS: to_json(manifest)}


def rebuilt_facts(ledger: dict[str, Any]) -> dict[str, Any]:
    """The facts of tensors that were rebuilt from an exported ledger, from the ledger's facts."""
    kept = {name: value for name, value in ledger.items() if name != "digest"}
    now = {"packages": installed(), "written": written(), "rebuilt_from_ledger": True}
    return kept | {"format": "zoscope-tensors"} | now


def write_manifest(manifest: dict[str, Any], tensors: Path, out: Path) -> None:
    """Write a manifest to where :func:`zo_core.artifacts.place.placed` picks it up.

    Args:
        manifest: the facts.
        tensors: the tensors file that it belongs to, under its hidden name.
        out: where that file goes.
    """
    text = json.dumps(json.loads(to_json(manifest | {"sha256": sha256(tensors)})), indent=1)
    companion(tensors, out).write_text(f"{text}\n")


def companion(temporary: Path, out: Path) -> Path:
    """The hidden name of a manifest, from that of its tensors file."""
    return temporary.with_name(temporary.name.replace(out.name, manifest_path(out).name, 1))


def manifest_path(out: Path) -> Path:
    """Where the manifest of a tensors file goes: ``tuned.safetensors`` has ``tuned.manifest.json``.

    A name with another ending keeps it.
    """
    stem = out.name.removesuffix(".safetensors")
    return out.with_name(f"{stem}.manifest.json")


def is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of a tensors file."""
    try:
        return json.loads(path.read_text())["format"] == "zoscope-tensors"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_tensors_export(path: Path) -> bool:
    """Whether a file was written by :func:`write_tensors`."""
    try:
        with path.open("rb") as stream:
            metadata, _ = read_header(stream)
        return json.loads(metadata[FACTS])["format"] == "zoscope-tensors"
    except (OSError, ValueError, KeyError, TypeError):
        return False
