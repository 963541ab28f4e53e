"""Loss curves of the final runs, thinned for small multiples: ``curves.parquet``."""

import numpy as np
import pandas as pd

from zo_core import runs
from zo_core.compare.outcomes import DIVERGED, DONE, FAILED
from zo_core.compare.reader import CURVES
from zo_core.compare.results import Results

POINTS = 80
"""Points of a curve."""
SPAN = 20
"""A point is an exponential moving average over a SPAN-th of the run's steps so far."""


class Curves:
    """The curves of a comparison, those of ended runs read once."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._ended: dict[str, pd.DataFrame] = {}

    def table(self, results: Results) -> pd.DataFrame:
        """A row a point: ``task, arm, seed, forward_passes, loss`` (training loss, smoothed)."""
        found = []
        for m in results.measurements:
            if not m.run_id or not results.spec.arm(m.arm).tunes:
                continue
            curve = self._ended.get(m.run_id)
            if curve is None:
                curve = _read(m.run_id)
                if m.state in (DONE, FAILED, DIVERGED):
                    self._ended[m.run_id] = curve
            found.append(curve.assign(task=m.task, arm=m.arm, seed=m.seed))
        return pd.concat(found)[CURVES] if found else pd.DataFrame(columns=CURVES, dtype=float)


def _read(run_id: str) -> pd.DataFrame:
    try:
        records, _ = runs.get(run_id).read_metrics()
    except (OSError, runs.RunNotFoundError):
        records = []
    steps = [r for r in records if r.get("kind") == "step"]
    passes = np.array([r["forward_passes"] for r in steps], dtype=float)
    loss = pd.Series([r.get("loss") for r in steps], dtype=float)
    smooth = loss.ewm(span=max(1, len(steps) // SPAN)).mean().to_numpy()
    last = len(steps) - 1
    kept = np.unique(np.linspace(0, last, POINTS).round().astype(int)) if steps else slice(0)
    return pd.DataFrame({"forward_passes": passes[kept], "loss": smooth[kept]}, dtype=float)
