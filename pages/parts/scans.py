"""A stored scan as a page shows it: its tables, read once, and what they are called."""

from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from pages.parts import history
from pages.parts.tables import read
from zo_core.analysis.outliers import ScanTables
from zo_core.reports.parts import PARTS


@dataclass(frozen=True)
class Scan:
    """A finished scan."""

    entry: history.Entry

    @cached_property
    def tables(self) -> ScanTables:
        """What the rules read.

        Raises:
            OSError: the scan has no layer table.
            ValueError: a table cannot be read.
        """
        return ScanTables.read(self.entry.run.result, read)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """Largest magnitude by layer and token, of the first sequences."""
        return read(self.entry.run.result("tokens.parquet"))

    @cached_property
    def layers(self) -> list[int]:
        """Numbers of the blocks."""
        return [int(k) for k in self.tables.layers["layer"] if k >= 0]

    def parts(self) -> list[str]:
        """The parts that the scan has statistics of."""
        if self.tables.parts is None:
            return ["block_output"]
        there = set(self.tables.parts["part"])
        return [part for part in PARTS if part in there]

    def part(self, name: str) -> pd.DataFrame:
        """Statistics of one part by layer."""
        if self.tables.parts is None:
            return self.tables.layers
        return self.tables.parts[self.tables.parts["part"] == name]

    @property
    def n_sequences(self) -> int:
        """How many sequences were scanned."""
        return self.entry.summary.get("n_sequences") or self.tokens["sequence"].nunique()

    @property
    def covered(self) -> str:
        """Which sequences the token table holds; empty if all of them."""
        kept = self.tokens["sequence"].nunique()
        return f"first {kept} of {self.n_sequences} sequences" if kept < self.n_sequences else ""

    @property
    def title(self) -> str:
        """Model, text and BOS, to tell two scans apart."""
        bos = {"add": "BOS added", "none": "no BOS"}.get(self.entry.job.bos, "")
        return " · ".join(part for part in (self.entry.title, bos) if part)
