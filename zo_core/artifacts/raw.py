"""Safetensors files as bytes: which tensors, where, and copies of some of them. No torch.

The format: 8 bytes little-endian length of the header, the header (JSON), the tensors' bytes.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 22
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file."""

    dtype: str
    """As the format spells it, such as ``F32``."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""
    end: int

    @property
    def values(self) -> int:
        """Number of entries."""
        return prod(self.shape)


def read_header(stream: BinaryIO) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata and tensors of a file, in the order of their bytes.

    Raises:
        ValueError: it is no whole safetensors file.
    """
    size = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    try:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        header = json.loads(stream.read(length))
        metadata = dict(header.pop("__metadata__", None) or {})
        first = 8 + length
        tensors = {
            name: Stored(
                entry["dtype"],
                tuple(entry["shape"]),
                *(first + int(offset) for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
    except (struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from error
    if any(not first <= t.start <= t.end <= size for t in tensors.values()):
        raise ValueError("it is cut short")
    return metadata, dict(sorted(tensors.items(), key=lambda item: item[1].start))


def pieces(stream: BinaryIO, tensor: Stored) -> Iterator[bytes]:
    """The bytes of one tensor."""
    stream.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        piece = stream.read(min(CHUNK, left))
        if not piece:
            raise ValueError("it is cut short")
        left -= len(piece)
        yield piece


def build_header(metadata: Mapping[str, str], tensors: Mapping[str, Stored]) -> bytes:
    """The header of a file that holds these tensors one after another."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.end - tensor.start
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    return struct.pack("<Q", len(text)) + text


def digest(stream: BinaryIO, tensors: Mapping[str, Stored]) -> str:
    """SHA-256 of names, dtypes, shapes and bits of tensors, whatever their order in the file."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(json.dumps([name, tensor.dtype, list(tensor.shape)]).encode())
        for piece in pieces(stream, tensor):
            total.update(piece)
    return total.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
