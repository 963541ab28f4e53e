"""The results of a comparison as its folder holds them, for the page and the report.

Only read, never computed: neither scipy nor the runs behind the tables are needed.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from zo_core.compare.spec import CompareSpec
from zo_core.compare.store import Comparison

ALL = "all"
"""The task of rows over all tasks, where there are several."""
ACTIVATION = ["layer", "top1", "median"]
SENSITIVITY = ["task", "layer", "metric", "mean", "sd", "se", "n"]
PARTS = {"arms", "claims", "correlations", "layers", "power", "precision", "search"}
"""What readers need of ``table.json``."""
CURVES = ["task", "arm", "seed", "forward_passes", "loss"]


@dataclass(frozen=True)
class Facts:
    """``table.json`` and ``curves.parquet``."""

    all: dict[str, Any]
    spec: CompareSpec
    curves: pd.DataFrame
    """``task, arm, seed, forward_passes, loss``."""

    @classmethod
    def read(cls, comparison: Comparison) -> "Facts | None":
        """The results as they are now; None while there are none, or only an earlier version's."""
        found = comparison.read_json("table.json")
        if found is None or not found.keys() >= PARTS:
            return None
        try:
            curves = pd.read_parquet(comparison.path / "curves.parquet")
        except (OSError, ValueError):
            curves = pd.DataFrame(columns=CURVES)
        return cls(found, comparison.spec, curves)

    def __getitem__(self, name: str) -> Any:
        """A part of ``table.json``."""
        return self.all[name]

    def table(self, name: str) -> pd.DataFrame:
        """A part of ``table.json`` that is a list of rows."""
        return pd.DataFrame(self.all[name])

    @property
    def tasks(self) -> list[str]:
        """Tasks of the tables, ``all`` last if there are several."""
        return list(dict.fromkeys(row["task"] for row in self.all["arms"]))

    def arms(self, task: str) -> pd.DataFrame:
        """The row of every arm on a task."""
        table = self.table("arms")
        return table[table["task"] == task]

    @property
    def tuned_arms(self) -> list[str]:
        """Names of the arms that tune, in order."""
        return [arm.name for arm in self.spec.arms if arm.tunes]

    @property
    def sweeps(self) -> list[str]:
        """Tasks with a measured gain of several single layers."""
        layers = self.table("layers")
        if layers.empty:
            return []
        return [task for task in self.tasks if (layers["task"] == task).sum() > 1]

    def sweep(
        self, task: str
    ) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, int | None, float | None]:
        """Gains, activation and sensitivity by layer, the dominant layer, and the gain of full.

        Over all tasks the sensitivity is left out: |g| of different tasks has no common scale.
        """
        gains = self.table("layers")
        felt = pd.DataFrame(self.all["sensitivity"], columns=SENSITIVITY)
        arms = self.arms(task).set_index("arm")
        full = next(
            (
                arm
                for arm in self.spec.arms
                if (arm.scope, arm.optimizer, arm.settings) == ("full", "zo-sgd", {})
            ),
            None,
        )
        row = arms.loc[full.name] if full is not None and full.name in arms.index else None
        lead = None
        if row is not None and pd.notna(row["mean"]) and pd.notna(row["before"]):
            lead = float(row["mean"]) - float(row["before"])
        return (
            gains[gains["task"] == task],
            pd.DataFrame(self.all["activation"], columns=ACTIVATION),
            felt[felt["task"] == task],
            self.all["dominant"],
            lead,
        )
