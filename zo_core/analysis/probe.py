"""A whole probe: every layer, every analysis that was asked for, in one walk through the model."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

from zo_core.analysis.scaling import FIXED, scale_factors
from zo_core.analysis.sensitivity import (
    ProbeSettings,
    ProbeTables,
    common_target,
    equalise_layer,
    probe_layer,
)
from zo_core.models.load import LoadedModel
from zo_core.zo.layerwise import LayerwiseBatch
from zo_core.zo.scope import TunedScope, scope_parameters


class Probe:
    """Layers of a model, probed one after the other. The model is left as it was, bit for bit."""

    def __init__(
        self,
        loaded: LoadedModel,
        batches: Sequence[LayerwiseBatch],
        layers: Sequence[int],
        settings: ProbeSettings,
        scalings: Collection[str] = (),
    ) -> None:
        """Plan a probe.

        Args:
            loaded: the model, with its base weights.
            batches: run once each; all of the same number of rows.
            layers: 0-based.
            settings: draws, eps and so on.
            scalings: fair perturbations to measure as well: ``count``, ``rms``, ``output``.
        """
        self._loaded, self._batches, self._settings = loaded, batches, settings
        self.layers = list(layers)
        self.tables = ProbeTables()
        self.target: float | None = None
        """Relative change of its own output that every layer is brought to; once it is known."""
        self._fixed = [s for s in FIXED if s in scalings]
        self._equalise = "output" in scalings
        self._factors = scale_factors(loaded).set_index("layer") if self._fixed else None

    @property
    def pairs(self) -> int:
        """Pairs of points that :meth:`run` measures: two forward passes each."""
        each = sum(eps != self._settings.eps for eps in self._settings.eps_sweep)
        total = 0
        for layer in self.layers:
            scaled = sum(factor != 1.0 for factor in self._factors_of(layer).values())
            runs = 1 + scaled + self._equalise
            total += self._settings.draws * (len(self._batches) * runs + each)
        return total

    def run(
        self,
        tick: Callable[[int], None] = lambda _layer: None,
        after_layer: Callable[[], None] = lambda: None,
    ) -> ProbeTables:
        """Measure.

        Args:
            tick: called with the layer after every pair of points; may raise to stop.
            after_layer: called when the tables have grown by a layer.
        """
        for layer in self.layers:
            scope = TunedScope(scope_parameters(self._loaded, layer))
            try:
                probe_layer(
                    self._batches,
                    layer,
                    scope,
                    self._settings,
                    self._factors_of(layer),
                    self.tables,
                    partial(tick, layer),
                )
            finally:
                scope.close()
            after_layer()
        if self._equalise:
            self.target = common_target(self.tables)
            for layer in self.layers:
                scope = TunedScope(scope_parameters(self._loaded, layer))
                try:
                    equalise_layer(
                        self._batches,
                        layer,
                        scope,
                        self._settings,
                        self.target,
                        self.tables,
                        partial(tick, layer),
                    )
                finally:
                    scope.close()
                after_layer()
        return self.tables

    def _factors_of(self, layer: int) -> dict[str, float]:
        if self._factors is None:
            return {}
        return {name: float(self._factors.at[layer, name]) for name in self._fixed}
