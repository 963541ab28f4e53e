"""The claims that a comparison is asked to decide, and which of them its arms can speak about."""

from dataclasses import dataclass

from zo_core.compare.spec import CompareSpec
from zo_core.scope_spec import parse

LEAST_LAYERS = 3
"""Other single layers without which there is no best one to speak of."""


@dataclass(frozen=True, slots=True)
class ClaimText:
    """A claim in words, and the scopes that it needs."""

    text: str
    needs: str


CLAIMS = {
    "a": ClaimText(
        "the dominant layer alone is at least as good as full ZO", "layer:auto and full"
    ),
    "b": ClaimText(
        "the dominant layer beats random layers", "layer:auto and random-layer:<seed> or layer:<k>"
    ),
    "c": ClaimText(
        "the first outlier layer is the best single layer",
        "layer:auto and at least three other layers, as layer:<k>",
    ),
    "d": ClaimText(
        "the full model without the dominant layer is worse than with it", "full and all-but:auto"
    ),
    "e": ClaimText(
        "the dominant layer is faster than full ZO and tunes fewer weights", "layer:auto and full"
    ),
}
"""(a) to (d) are decided together (Holm); (e) is timed and stands alone."""


def worded(key: str) -> str:
    """A claim as reports name it: ``(a) the dominant layer ...``."""
    return f"({key}) {CLAIMS[key].text}"


def claims_asked(spec: CompareSpec) -> list[str]:
    """The claims that a comparison's arms speak about, as far as can be told before it runs.

    A preset with every layer has the dominant one among them.
    """
    plain = {a.scope for a in spec.arms if a.tunes and not a.settings and a.optimizer == "zo-sgd"}
    forms = [parse(scope.replace("{seed}", "0")).form for scope in plain]
    layers = forms.count("layer")
    dominant = "layer:auto" in plain or layers > LEAST_LAYERS
    full = "full" in plain
    asked = {
        "a": dominant and full,
        "b": dominant and (layers > 1 or "random-layer" in forms),
        "c": dominant and layers > LEAST_LAYERS,
        "d": full and "all-but" in forms,
        "e": dominant and full,
    }
    return [key for key, found in asked.items() if found]
