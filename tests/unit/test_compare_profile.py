"""Gains by layer, and their rank correlation with a scan and a probe."""

import pandas as pd
import pytest

from zo_core.compare.profile import layer_gains, rank_correlations
from zo_core.compare.results import Measurement, Results
from zo_core.compare.spec import CompareSpec

LAYERS = 5


def results() -> Results:
    arms = [{"name": f"l{k}", "scope": f"layer:{k}"} for k in range(LAYERS)]
    arms += [{"name": "full", "scope": "full"}]
    arms += [{"name": "half", "scope": "layer:0", "precision": "inplace"}]
    spec = CompareSpec.model_validate({"arms": arms, "seeds": [0, 1], "steps": 3})
    found = [
        Measurement(
            "reviews",
            arm.name,
            seed,
            "done",
            value=0.5 + 0.1 * i + 0.02 * seed,
            before=0.5,
            resolved_scope=arm.scope,
            layer=i if i < LAYERS else 0 if arm.name == "half" else None,
        )
        for i, arm in enumerate(spec.arms)
        for seed in spec.seeds
    ]
    return Results(spec, found)


def test_gain_of_every_layer() -> None:
    gains = layer_gains(results())
    assert list(gains["layer"]) == list(range(LAYERS)), "single layers with plain settings only"
    assert gains["mean"].tolist() == pytest.approx([0.1 * k + 0.01 for k in range(LAYERS)])
    assert set(gains["n"]) == {2}
    assert (gains["low"] < gains["high"]).all()


def test_rank_correlations_with_scan_and_probe() -> None:
    scan = pd.DataFrame({"layer": range(LAYERS), "top1": [1, 4, 9, 16, 25], "median": 2.0})
    probe = pd.DataFrame({"layer": range(LAYERS), "mean": [5.0, 4, 3, 2, 1]})
    table = rank_correlations(layer_gains(results()), scan, probe).set_index(["a", "b"])
    assert table["rho"].to_dict() == {
        ("gain", "outlier"): pytest.approx(1),
        ("gain", "sensitivity"): pytest.approx(-1),
        ("outlier", "sensitivity"): pytest.approx(-1),
    }
    assert table.loc[("gain", "outlier"), "p"] == pytest.approx(2 / 120), "of all orders of five"
    assert (
        rank_correlations(layer_gains(results()).head(3), scan, probe.head(0))["rho"].isna().all()
    )
