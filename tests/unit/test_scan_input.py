"""What a scan says of models, texts and settings that it cannot use."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from tests.unit.families import save
from tests.unit.planted import Plant, build
from zo_core import runs
from zo_core.errors import UserError
from zo_core.jobs import ScanJob
from zo_core.models.decoder import find_decoder
from zo_core.progress import JobContext
from zo_core.recipes.scan import run_scan
from zo_core.runs import Process, Run
from zo_core.settings import settings

PROMPT = "The harbour was quiet and the boats lay still."


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path / "cache")


def scanned(**fields: object) -> Run:
    job = ScanJob.model_validate({"device": "cpu", "text": "prompt", "prompt": PROMPT} | fields)
    run = runs.create(job, Process.current())
    run_scan(job, run, JobContext(run))
    return run


@pytest.mark.parametrize("placement", ["offload", "stream"])
def test_every_placement_writes_the_same_tables(tmp_path: Path, placement: str) -> None:
    """Offload finds room for all of it."""
    model = str(save(build("llama"), tmp_path / "model"))
    run = scanned(model=model, placement=placement)
    summary = run.result_json()
    assert summary is not None
    assert summary["placement"] == placement
    whole = scanned(model=model)
    for name in ("layers", "parts", "channels", "tokens", "weights", "owl"):
        one, other = (pd.read_parquet(r.result(f"{name}.parquet")) for r in (run, whole))
        pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "Hm"}, "text: the longest text has 2 tokens: give at least 4."),
        ({"bos": "add"}, "bos: this tokenizer has no BOS token: choose auto or none."),
    ],
)
@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_unusable_text_is_a_sentence(fields: dict[str, str], said: str, placement: str) -> None:
    with pytest.raises(UserError) as caught:
        scanned(placement=placement, **fields)
    assert str(caught.value) == said


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_float16_overflow_names_the_layer_and_proposes_bfloat16(
    tmp_path: Path, placement: str
) -> None:
    """The plant of layer 2 is beyond 65504, the largest float16; the scan goes on."""
    plant = Plant(layer=2, token=4242, channel=19)
    model = build("llama", plant)
    with torch.no_grad():  # every token of the prompt carries it
        model.get_input_embeddings().weight[:] = model.get_input_embeddings().weight[plant.token]
    folder = save(model, tmp_path / "model")
    run = scanned(model=str(folder), dtype="float16", placement=placement)
    log = run.log_text()
    assert "layer 1 has" not in log
    line = next(line for line in log.splitlines() if " layer 2 has" in line and "first" in line)
    assert "scan in bfloat16" in line
    assert "layer 5 has" in log
    layers = pd.read_parquet(run.result("layers.parquet")).set_index("layer")
    assert layers.loc[1, "nonfinite"] == 0
    assert layers.loc[2, "nonfinite"] > 0
    assert (layers.loc[2, "nonfinite_sequence"], layers.loc[2, "nonfinite_position"]) == (0, 0)
    fine = scanned(model=str(folder), dtype="bfloat16", placement=placement)
    assert "NaN" not in fine.log_text()


class Chain(nn.Module):
    """Blocks in a plain Sequential."""

    def __init__(self) -> None:  # noqa: D107
        super().__init__()
        self.embed, self.blocks = nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 4))


class Twin(nn.Module):
    """Two stacks of one size."""

    def __init__(self) -> None:  # noqa: D107
        super().__init__()
        self.left, self.right = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))


def test_model_without_one_list_of_blocks_is_refused() -> None:
    looked = "cannot be read: looked for one nn.ModuleList that holds all decoder blocks"
    with pytest.raises(UserError, match=f"Chain {looked} and found none among embed, blocks"):
        find_decoder(Chain())
    with pytest.raises(UserError, match=f"Twin {looked} and found two of like size: left"):
        find_decoder(Twin())
