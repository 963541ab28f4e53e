"""Rows from files: JSON lines (also gzipped), CSV and Parquet."""

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from pyarrow import parquet

from zo_core.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""Of Hugging Face data, which has nested fields: CSV cannot hold them."""


def find_split(root: Path, split: str, suffixes: tuple[str, ...] = SUFFIXES) -> Path | None:
    """The file of a split in a folder."""
    return next((p for s in suffixes if (p := root / f"{split}{s}").is_file()), None)


def read_rows(path: Path, field: str = "data_dir") -> list[dict[str, Any]]:
    """The rows of a file, told by its suffix.

    Args:
        path: the file.
        field: the job field that errors name.

    Raises:
        UserError: it cannot be read, or is not a list of rows.
    """
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
        if path.suffix == ".csv":
            return _read_csv(text)
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{field}: {path} cannot be read: {error}.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{field}: every line of {path} must be a JSON object.")
    return rows


def _read_csv(text: str) -> list[dict[str, Any]]:
    """Rows of a CSV with a header; a short row lacks its last fields.

    Raises:
        ValueError: a row has more cells than the header.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more cells than the header names")
        rows.append(row)
    return rows
