"""Streaming block by block: the same bits as the ordinary scan, and clear words on bad files."""

import json
import random
from pathlib import Path

import pandas as pd
import pytest

from tests.unit.families import save
from tests.unit.planted import FAMILIES, Plant, build
from zo_core.analysis import streaming
from zo_core.analysis.activations import ActivationScan
from zo_core.analysis.streaming import scan_blockwise
from zo_core.errors import UserError
from zo_core.jobs import ModelFields
from zo_core.models.blockwise import BlockwiseModel
from zo_core.models.load import load

PLANT = Plant(layer=2, token=4242, channel=19)
TABLES = ("parts", "layers", "channels", "tokens", "weights", "owl")


def sequences() -> list[list[int]]:
    draw = random.Random(3)
    ids = [[draw.randrange(2, 4000) for _ in range(n)] for n in (9, 4, 17, 12, 6)]
    ids[2][3] = PLANT.token
    return ids


def assert_same(one: ActivationScan, other: ActivationScan) -> None:
    for name in TABLES:
        pd.testing.assert_frame_equal(
            getattr(one, name)(), getattr(other, name)(), check_exact=True
        )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_streaming_gives_the_bits_of_the_ordinary_scan(tmp_path: Path, family: str) -> None:
    folder = save(build(family, PLANT), tmp_path, max_shard_size="200KB")
    fields = ModelFields(model=str(folder), device="cpu")
    whole = ActivationScan(load(fields))
    whole.run(sequences(), 2)
    blockwise = BlockwiseModel(fields)
    streamed = ActivationScan(blockwise.loaded)
    scan_blockwise(streamed, blockwise, sequences(), 2)
    assert_same(whole, streamed)
