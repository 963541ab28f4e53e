"""What an outlier rule is, what it reads and what it answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd

State = Literal["found", "none", "ill-defined", "missing"]
Kind = Literal["activation", "feature", "weight", "weighting"]
"""What a rule looks for: a massive activation; a feature that is large at many positions; a weight;
or nothing, and it only weighs the layers."""
TABLES = ("layers", "parts", "channels", "weights", "owl")


@dataclass(frozen=True, slots=True)
class ScanTables:
    """The tables of one scan that rules read; columns as in docs/scan.md."""

    layers: pd.DataFrame
    """One row a layer (-1: embedding output): magnitudes of the block output."""
    parts: pd.DataFrame | None = None
    """One row a layer and part (block, attention and MLP output, down-projection input)."""
    channels: pd.DataFrame | None = None
    """One row a layer, part and channel: largest magnitude, tokens with one of 6 or more; see
    :meth:`channels_of`."""
    weights: pd.DataFrame | None = None
    """One row a down-projection: its weights."""
    owl: pd.DataFrame | None = None
    """One row a layer and m: share of Wanda scores above m x their mean."""

    @classmethod
    def read(
        cls,
        file_of: Callable[[str], Path],
        reader: Callable[[Path], pd.DataFrame] = pd.read_parquet,
    ) -> "ScanTables":
        """Read what a stored scan has; scans of earlier versions have fewer tables.

        Args:
            file_of: the path of a result's name, such as ``run.result``.
            reader: reads a Parquet file.

        Raises:
            OSError: the scan has no layer table.
        """
        found = {name: file_of(f"{name}.parquet") for name in TABLES}
        return cls(
            **{
                name: reader(path)
                for name, path in found.items()
                if name == "layers" or path.is_file()
            }
        )

    def channels_of(self, part: str = "block_output") -> pd.DataFrame:
        """The rows of :attr:`channels` of one part; none if the scan kept none.

        A scan of an earlier version has the block output alone, and no column ``part``.
        """
        if self.channels is None:
            return pd.DataFrame(columns=["layer", "channel", "magnitude"], dtype=float)
        if "part" in self.channels:
            return self.channels[self.channels["part"] == part]
        return self.channels if part == "block_output" else self.channels[:0]

    def named(self) -> dict[str, pd.DataFrame]:
        """The tables that are there, by name."""
        return {n: table for n in TABLES if (table := getattr(self, n)) is not None}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says of a model, with the numbers behind it."""

    layer: int | None
    """0-based, or None unless ``state`` is ``found``."""
    reason: str
    state: State = "none"
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The numbers of the named layer, or of the one that comes closest."""
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A rule with its exact definition and default parameters."""

    name: str
    title: str
    kind: Kind
    definition: str
    source: str
    parameters: dict[str, float]
    apply: Callable[..., Verdict]
    """Called with :class:`ScanTables` and the parameters."""
    needs: str = "layers"
    """The table that it reads."""
    choices: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Parameters that take only the values that the scan has counted."""


def short(value: float) -> str:
    """A magnitude in a sentence: 995, 87.9, 0.046."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def found(layer: int, reason: str, **numbers: float) -> Verdict:
    """The verdict that names a layer."""
    return Verdict(layer, reason, "found", numbers)


def none(reason: str, **numbers: float) -> Verdict:
    """The verdict that there is no such layer; the sentence begins with that."""
    return Verdict(None, f"None found: {reason}", "none", numbers)


def ill_defined(reason: str, **numbers: float) -> Verdict:
    """The verdict that the rule's question has no answer here."""
    return Verdict(None, f"Ill-defined: {reason}", "ill-defined", numbers)


def blocks_of(table: pd.DataFrame, columns: tuple[str, ...] = ("median", "mean")) -> pd.DataFrame:
    """The blocks' rows in order, those without a finite magnitude above 0 left out."""
    usable = (table[list(columns)] > 0).all(axis=1) & (table["layer"] >= 0)
    return table[usable].sort_values("layer", ignore_index=True)
