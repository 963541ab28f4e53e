"""The rules beyond top-1 ratios, on synthetic tables with known answers, and their agreement."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planted import Plant, build, in_memory
from tests.unit.test_planted import sequences
from zo_core.analysis.activations import ActivationScan
from zo_core.analysis.outliers import OWL_M, RULES, ScanTables, first_outlier_layer
from zo_core.analysis.outliers.agreement import consensus, judge_all, rules_table, votes
from zo_core.analysis.outliers.robust import modified_z
from zo_core.analysis.outliers.weights import outlying_columns, owl_weights
from zo_core.jobs import ScanJob
from zo_core.models.load import LoadedModel
from zo_core.tasks.texts import texts_of, tokenise

TOKENS, CHANNELS = 200, 16


def layers_of(top1: Sequence[float], embedding: float = 1.0, **columns: float) -> pd.DataFrame:
    """A layer table whose medians and means are 1."""
    rows = {"layer": range(-1, len(top1)), "top1": [embedding, *top1], "median": 1.0, "mean": 1.0}
    return pd.DataFrame(rows | {"count": TOKENS * CHANNELS, "nonfinite": 0} | columns)


def channels_of(n_layers: int, large: dict[tuple[int, int], int]) -> pd.DataFrame:
    """A channel table: ``large`` gives (layer, channel) -> tokens at which it reaches 6."""
    places = [(k, c) for k in range(n_layers) for c in range(CHANNELS)]
    return pd.DataFrame(
        {
            "layer": [k for k, _ in places],
            "channel": [c for _, c in places],
            "magnitude": [6.0 if p in large else 5.999 for p in places],
            "tokens6": [large.get(p, 0) for p in places],
        }
    )


def weights_of(peaks: Sequence[float], experts: int = 1) -> pd.DataFrame:
    """A weight table: the last expert of each layer has the peak, the others are quiet."""
    rows = [
        {
            "layer": k,
            "expert": e,
            "column_peak": peak if e == experts - 1 else 5.0,
            "column_peak_column": 7,
            "column_peak_row": 3,
            "column_peak_median": 4.0,
        }
        for k, peak in enumerate(peaks)
        for e in range(experts)
    ]
    return pd.DataFrame(rows)


def tables_of(top1: Sequence[float], **more: pd.DataFrame) -> ScanTables:
    return ScanTables(layers_of(top1), **more)


# -- robust z-score ------------------------------------------------------------------------------


@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=30), st.integers(1, 50))
def test_modified_z_knows_no_scale_and_no_origin(values: list[int], factor: int) -> None:
    series = pd.Series(values, dtype=float)
    scores = modified_z(series)
    assert scores.notna().all()
    np.testing.assert_allclose(modified_z(factor * series + 7), scores, atol=1e-6)
    np.testing.assert_allclose(modified_z(-series), -scores, atol=1e-9)


def test_modified_z_of_known_values() -> None:
    scores = modified_z(pd.Series([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert list(scores) == pytest.approx([-1.349, -0.6745, 0, 0.6745, 0.6745 * 97])
    # MAD 0: the mean absolute deviation, here 2, takes its place.
    assert modified_z(pd.Series([5.0, 5, 5, 5, 15])).iloc[-1] == pytest.approx(10 / (1.2533 * 2))
    assert list(modified_z(pd.Series([3.0, 3, 3]))) == [0, 0, 0]


@given(st.integers(5, 40), st.data())
def test_zscore_names_the_largest_jump(n_layers: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, n_layers - 1))
    noise = data.draw(st.lists(st.floats(0.9, 1.1), min_size=n_layers, max_size=n_layers))
    top1 = [20 * x * (1 if k < layer else 100) for k, x in enumerate(noise)]
    tables = ScanTables(layers_of(top1, embedding=20.0))
    verdict = first_outlier_layer("zscore", tables)
    assert verdict.layer == layer, verdict.reason
    assert verdict.numbers["jump"] > 80


def test_zscore_thresholds_at_their_edges() -> None:
    layers = layers_of([10, 11, 12, 48, 50, 51, 52], embedding=10.0)
    found = first_outlier_layer("zscore", layers)
    assert found.layer == 3
    assert found.numbers["jump"] == pytest.approx(4)
    z, jump = found.numbers["z"], found.numbers["jump"]
    assert first_outlier_layer("zscore", layers, z=z, jump=jump).layer == 3
    assert first_outlier_layer("zscore", layers, z=math.nextafter(z, 99)).layer is None
    assert first_outlier_layer("zscore", layers, jump=math.nextafter(jump, 99)).layer is None


@given(st.integers(5, 40), st.floats(1.05, 1.9))
def test_zscore_finds_nothing_in_gradual_growth(n_layers: int, growth: float) -> None:
    layers = layers_of([50 * growth**k for k in range(1, n_layers + 1)], embedding=50.0)
    verdict = first_outlier_layer("zscore", layers)
    assert verdict.state == "none"
    assert "the largest jump" in verdict.reason


def test_zscore_does_not_jump_over_a_layer_that_is_missing() -> None:
    top1 = [10, 11, math.nan, 900, 910, 920, 930]
    verdict = first_outlier_layer("zscore", layers_of(top1, embedding=10.0))
    assert verdict.layer is None, "what happened at layer 2 or 3 is not known"
    assert first_outlier_layer("zscore", layers_of([10, 900], embedding=10.0)).state == "none"


# -- down-projection input -----------------------------------------------------------------------


def test_down_input_reads_its_part_alone() -> None:
    block = layers_of([9000.0] * 6).assign(part="block_output")
    down = layers_of([5, 5, 1001, 9, 2000, 5]).assign(part="down_input")
    tables = ScanTables(layers_of([5.0] * 6), parts=pd.concat([block, down[down["layer"] >= 0]]))
    verdict = first_outlier_layer("down_input", tables)
    assert verdict.layer == 2
    assert verdict.numbers == {"top1": 1001, "times_mean": 1001}
    assert first_outlier_layer("down_input", tables, ratio=1001).layer == 4, "more than, not equal"
    assert first_outlier_layer("down_input", tables, ratio=2000).layer is None
    none = replace(tables, parts=block)
    assert "the family has none" in first_outlier_layer("down_input", none).reason


# -- LLM.int8() ----------------------------------------------------------------------------------


def test_int8_needs_layers_and_positions_at_their_edges() -> None:
    """Two of eight layers, and 12 % in each of them, which is 3 % of all positions."""
    n_layers = 8
    tables = tables_of([5.0] * 8, channels=channels_of(n_layers, {(3, 5): 24, (6, 5): 24}))
    exact = 48 / (n_layers * TOKENS)
    assert first_outlier_layer("int8", tables).layer is None
    found = first_outlier_layer("int8", tables, positions=exact)
    assert found.layer == 3
    assert found.numbers == {"features": 1, "layers_share": 0.25, "positions_share": exact}
    assert first_outlier_layer("int8", tables, positions=math.nextafter(exact, 1)).layer is None
    assert first_outlier_layer("int8", tables, positions=exact, layers=0.2501).layer is None


def test_int8_names_the_first_layer_that_has_the_share_of_positions() -> None:
    """One token in layer 0 is too few; channel 2 is large in one layer only."""
    large = {(0, 9): 1, (1, 9): 190, (2, 9): 190, (3, 9): 190, (0, 2): TOKENS}
    verdict = first_outlier_layer("int8", tables_of([5.0] * 8, channels=channels_of(8, large)))
    assert verdict.layer == 1
    assert "channel 9 reaches 6 in 50% of layers" in verdict.reason
    assert verdict.numbers["features"] == 1


def test_int8_reads_the_block_output_alone() -> None:
    """Whatever the other parts hold; a scan without the column is of the block output."""
    large = {(k, 3): 40 for k in range(2, 8)}
    block = channels_of(8, large)
    loud = channels_of(8, {(k, c): 90 for k in range(8) for c in range(CHANNELS)})
    wider = loud.assign(channel=loud["channel"] + CHANNELS, part="down_input")
    parts = pd.concat([loud.assign(part="mlp_output"), block.assign(part="block_output"), wider])
    old, new = (tables_of([5.0] * 8, channels=channels) for channels in (block, parts))
    assert first_outlier_layer("int8", new) == first_outlier_layer("int8", old)
    assert first_outlier_layer("int8", new).layer == 2
    assert old.channels_of("down_input").empty
    assert len(new.channels_of("down_input")) == len(loud)


def test_int8_is_not_moved_by_one_massive_token() -> None:
    large = {(k, 4): 1 for k in range(2, 8)}
    verdict = first_outlier_layer("int8", tables_of([5000.0] * 8, channels=channels_of(8, large)))
    assert verdict.layer is None
    assert "75% of layers and at 0.4% of positions" in verdict.reason


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 3])
def test_down_weights_names_the_first_outlying_column(experts: int) -> None:
    weights = weights_of([5, 6, 40, 5, 5, 80], experts)
    tables = tables_of([5.0] * 6, weights=weights)
    verdict = first_outlier_layer("down_weights", tables)
    assert verdict.layer == 2
    assert verdict.numbers["ratio"] == 10
    assert (verdict.numbers["input_neuron"], verdict.numbers["output_channel"]) == (7, 3)
    assert first_outlier_layer("down_weights", tables, ratio=10.1).layer == 5
    assert first_outlier_layer("down_weights", tables, ratio=20.1).layer is None
    assert list(outlying_columns(weights)["expert"])[2] == experts - 1


def test_down_weights_need_no_finite_activations() -> None:
    layers = layers_of([5.0] * 6, nonfinite=1)
    tables = ScanTables(layers, weights=weights_of([5, 40, 5, 5, 5, 5]))
    assert first_outlier_layer("down_weights", tables).layer == 1
    assert first_outlier_layer("massive", tables).state == "ill-defined"
    empty = ScanTables(layers, weights=weights_of([]).reindex(columns=weights_of([1]).columns))
    assert "no down-projection" in first_outlier_layer("down_weights", empty).reason


def test_owl_weighs_layers() -> None:
    owl = pd.DataFrame(
        [(k, m, share / m) for k, share in enumerate((0.01, 0.06, 0.03)) for m in OWL_M],
        columns=["layer", "m", "share"],
    )
    tables = tables_of([5.0] * 3, owl=owl)
    for m in OWL_M:
        weights = owl_weights(owl, m)
        assert weights["probability"].sum() == pytest.approx(1)
        verdict = first_outlier_layer("owl", tables, m=m)
        assert verdict.layer == 1
        assert verdict.numbers["share"] == pytest.approx(0.06 / m)
        assert verdict.numbers["probability"] == pytest.approx(0.6)
    silent = tables_of([5.0] * 3, owl=owl.assign(share=0.0))
    assert first_outlier_layer("owl", silent).state == "none"


# -- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [r for r in RULES if RULES[r].needs != "layers"])
def test_a_scan_without_the_table_says_so(rule: str) -> None:
    verdict = first_outlier_layer(rule, layers_of([5.0] * 6))
    assert (verdict.state, verdict.layer) == ("missing", None)
    assert "scan again" in verdict.reason
    old = ScanTables(layers_of([5.0] * 6), channels=pd.DataFrame({"layer": [0], "magnitude": [1]}))
    assert first_outlier_layer("int8", old).state == "missing"


def whole(massive: bool) -> ScanTables:
    """A scan of eight layers with every table, massive from layer 3 on or quiet."""
    top1 = [30, 31, 32] + ([2000.0] * 5 if massive else [33.0] * 5)
    down = [5, 5, 5, 4000.0 if massive else 6, 5, 5, 5, 5]
    layers = layers_of(top1, embedding=30.0)
    parts = layers_of(down).assign(part="down_input")
    owl = pd.DataFrame({"layer": range(8), "m": 5.0, "share": [0.01 * (k + 1) for k in range(8)]})
    peaks = [5.0] * 3 + [60.0 if massive else 5.0] + [5.0] * 4
    return ScanTables(
        layers, parts[parts["layer"] >= 0], channels_of(8, {}), weights_of(peaks), owl
    )


def test_agreement_counts_the_rules_that_could_have_said_none() -> None:
    verdicts = judge_all(whole(massive=True))
    assert votes(verdicts) == {3: 6}
    assert consensus(verdicts) == "6 of 7 rules name layer 3; 1 names none."
    table = rules_table(verdicts).set_index("rule")
    assert list(table.index) == list(RULES)
    agree = table["agree"].dropna()
    assert set(agree.index) == set(RULES) - {"int8", "owl"}
    assert set(agree) == {6}
    assert table.loc["owl", "layer"] == 7, "a weighting names a layer and does not vote"
    assert "times_median = 2000" in table.loc["massive", "numbers"]
    assert table.loc["massive", "parameters"] == "magnitude = 100, ratio = 1000"


def test_a_quiet_model_has_no_outlier_layer_by_any_rule() -> None:
    verdicts = judge_all(whole(massive=False))
    assert not votes(verdicts)
    assert consensus(verdicts) == "None of 7 rules names a layer."
    assert {v.state for n, v in verdicts.items() if n != "owl"} == {"none"}
    assert all(v.numbers for v in verdicts.values()), "none comes with numbers"


def test_thresholds_go_to_their_own_rule() -> None:
    tables = whole(massive=True)
    verdicts = judge_all(tables, {"massive": {"ratio": 5000.0}})
    assert verdicts["massive"].layer is None
    assert verdicts["systematic"].layer == 3
    assert consensus(verdicts) == "5 of 7 rules name layer 3; 2 name none."


@settings(max_examples=5)
@given(st.randoms(use_true_random=False))
def test_order_of_the_rows_matters_to_no_rule(draw: object) -> None:
    tables = whole(massive=True)

    def shuffled(table: pd.DataFrame) -> pd.DataFrame:
        order = list(range(len(table)))
        draw.shuffle(order)  # type: ignore[attr-defined]
        return table.iloc[order]

    names = ("layers", "parts", "channels", "weights", "owl")
    mixed = ScanTables(**{name: shuffled(getattr(tables, name)) for name in names})
    assert judge_all(mixed) == judge_all(tables)


@pytest.mark.parametrize("rule", RULES)
def test_choices_hold_the_default(rule: str) -> None:
    spec = RULES[rule]
    for name, values in spec.choices.items():
        assert spec.parameters[name] in values


# -- real scans ----------------------------------------------------------------------------------


def scanned(family: str, plant: Plant | None) -> tuple[LoadedModel, ScanTables]:
    loaded = in_memory(build(family, plant, seed=3))
    ids, _, _ = sequences(random.Random(3), plant)
    scan = ActivationScan(loaded)
    scan.run(ids, 2)
    return loaded, ScanTables(
        scan.layers(), scan.parts(), scan.channels(), scan.weights(), scan.owl()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "falcon", "opt-post-ln"])
def test_a_real_scan_names_the_planted_layer_or_none(family: str) -> None:
    """Where the plant is no weight of the down-projection, the rule on weights says none."""
    plant = Plant(layer=2, token=77, channel=9)
    loaded, tables = scanned(family, plant)
    verdicts = judge_all(tables)
    assert {verdicts[rule].layer for rule in ("emergence", "massive", "zscore")} == {2}
    for rule in ("systematic", "down_input", "down_weights"):
        assert verdicts[rule].layer in (2, None), verdicts[rule].reason
    assert votes(verdicts)[2] >= 3
    if family in ("llama", "gpt2", "mixtral", "falcon"):
        numbers = verdicts["down_weights"].numbers
        assert verdicts["down_weights"].layer == 2
        assert numbers["output_channel"] == plant.channel
    quiet = judge_all(scanned(family, None)[1])
    found = {rule: v.layer for rule, v in quiet.items() if v.layer is not None}
    # Gemma's embeddings are so large that every channel is an outlier feature.
    assert set(found) <= {"owl", "int8"} if family == "gemma2" else set(found) == {"owl"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_column_peaks_are_those_of_the_weights(family: str) -> None:
    loaded, tables = scanned(family, None)
    assert tables.weights is not None
    for row in tables.weights.itertuples():
        mlp = loaded.decoder.blocks[int(row.layer)].mlp
        if family == "gpt2":
            weight = mlp.c_proj.weight.T
        elif family == "mixtral":
            weight = mlp.experts.down_proj[int(row.expert)]
        else:
            weight = mlp.down_proj.weight
        magnitude = np.abs(weight.detach().numpy())
        peaks = magnitude.max(0) / magnitude.mean(0)
        assert row.column_peak == pytest.approx(peaks.max(), rel=1e-5)
        assert row.column_peak_column == peaks.argmax()
        assert row.column_peak_row == magnitude[:, peaks.argmax()].argmax()
        assert row.column_peak_median == pytest.approx(np.sort(peaks)[(len(peaks) - 1) // 2], 1e-5)


def test_bundled_model_by_every_rule(demo: LoadedModel) -> None:
    """The answers of docs/outliers.md."""
    job = ScanJob()
    texts = tokenise(texts_of(job), demo.tokenizer, "auto", job.max_tokens)
    scan = ActivationScan(demo)
    scan.run(texts[:4], 4)
    tables = ScanTables(scan.layers(), scan.parts(), scan.channels(), scan.weights(), scan.owl())
    layers = {rule: verdict.layer for rule, verdict in judge_all(tables).items()}
    assert layers == {
        "emergence": 3,
        "massive": None,
        "systematic": None,
        "zscore": 3,
        "down_input": 3,
        "int8": 0,
        "down_weights": 3,
        "owl": 0,
    }
    assert first_outlier_layer("massive", tables, ratio=500).layer == 3
