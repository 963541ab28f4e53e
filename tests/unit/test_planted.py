"""Planted truth: in every family the scan and the rules name the planted layer, token, channel."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planted import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    MOE,
    SOURCE,
    STAYS,
    UNIT,
    VOCABULARY,
    Plant,
    build,
    in_memory,
)
from zo_core.analysis.activations import ActivationScan
from zo_core.analysis.outliers import first_outlier_layer

RULES = ("emergence", "massive", "systematic")
LENGTHS = (12, 7, 20, 15, 9)
channels = st.integers(0, HIDDEN - 1).filter(lambda c: c != SOURCE)
plants = st.builds(
    Plant,
    layer=st.integers(0, LAYERS - STAYS - 1),
    token=st.integers(2, VOCABULARY - 1),
    channel=channels,
)
seeds = st.integers(0, 10_000)


def sequences(draw: random.Random, plant: Plant | None) -> tuple[list[list[int]], int, int]:
    """Token ids without the planted token but for one place: (ids, its sequence, its position)."""
    usual = [t for t in range(2, VOCABULARY) if plant is None or t != plant.token]
    ids = [[draw.choice(usual) for _ in range(n)] for n in LENGTHS]
    sequence = draw.randrange(len(LENGTHS))
    position = draw.randrange(LENGTHS[sequence])
    if plant is not None:
        ids[sequence][position] = plant.token
    return ids, sequence, position


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_plant_is_found_in_every_family(family: str) -> None:
    draw = random.Random(family)
    channel = draw.choice([c for c in range(HIDDEN) if c != SOURCE])
    plant = Plant(draw.randrange(LAYERS - STAYS), draw.randrange(2, VOCABULARY), channel)
    check_plant(family, plant, draw.randrange(10_000))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(family=st.sampled_from(sorted(FAMILIES)), plant=plants, seed=seeds)
def test_any_plant_is_found(family: str, plant: Plant, seed: int) -> None:
    check_plant(family, plant, seed)


def check_plant(family: str, plant: Plant, seed: int) -> None:
    """The scan and the rules name layer, token and channel of a plant."""
    loaded = in_memory(build(family, plant, seed))
    ids, sequence, position = sequences(random.Random(seed), plant)
    scan = ActivationScan(loaded)
    scan.run(ids, batch_size=2)
    table = scan.layers()
    for rule in RULES:
        if family == "opt-post-ln" and rule == "systematic":
            continue  # its last norm raises the mean magnitude of the planted layer, too
        verdict = first_outlier_layer(rule, table)
        assert verdict.layer == plant.layer, (rule, verdict.reason)
    parts = scan.parts().set_index(["layer", "part"])
    row = parts.loc[plant.layer, "block_output"]
    assert (row["top1_sequence"], row["top1_position"]) == (sequence, position)
    assert row["top1_channel"] == plant.channel
    assert row["top1_token"] == loaded.tokenizer.decode([plant.token])
    assert row["top1"] > 1e4
    # Who writes it: the MLP, from the planted unit of its down-projection.
    row = parts.loc[plant.layer, "mlp_output"]
    place = (row["top1_sequence"], row["top1_position"], row["top1_channel"])
    assert place == (sequence, position, plant.channel)
    row = parts.loc[plant.layer, "down_input"]
    assert (row["top1_sequence"], row["top1_position"]) == (sequence, position)
    width = int(scan.weights().query(f"layer == {plant.layer}")["inputs"].iloc[0])
    assert row["top1_channel"] % (width if family in MOE else 10_000) == UNIT
    assert parts.loc[plant.layer, "attention_output"]["top1"] < 10


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nothing_is_found_without_a_plant(family: str) -> None:
    seed = random.Random(family).randrange(10_000)
    ids, _, _ = sequences(random.Random(seed), None)
    scan = ActivationScan(in_memory(build(family, None, seed)))
    scan.run(ids, batch_size=2)
    for rule in RULES:
        verdict = first_outlier_layer(rule, scan.layers())
        assert verdict.layer is None, (rule, verdict.reason)
        assert "None found" in verdict.reason
