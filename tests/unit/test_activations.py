"""The activation scan: equal to brute force, and true on models with a planted outlier."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.families import HIDDEN, LAYERS, VOCABULARY, Plant, build, save
from zo_core import runs
from zo_core.analysis.activations import EMBEDDING, ActivationScan
from zo_core.analysis.outliers import RULES
from zo_core.analysis.statistics import Statistics
from zo_core.jobs import ModelFields, ScanJob
from zo_core.models.load import LoadedModel, load
from zo_core.progress import JobContext
from zo_core.recipes.scan import run_scan
from zo_core.runs import Process
from zo_core.settings import settings as zo_settings

MEDIAN = 4e-3
"""The stated relative accuracy of the median."""
PLANT = Plant(layer=2, token=4242, channel=19, weight=2e4)
Stack = dict[int, list[torch.Tensor]]


def random_sequences(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token ids, none of them the planted one."""
    draw = random.Random(seed)
    tokens = [t for t in range(2, VOCABULARY) if t != PLANT.token]
    return [[draw.choice(tokens) for _ in range(n)] for n in lengths]


def scan_of(loaded: LoadedModel, sequences: list[list[int]], batch_size: int) -> ActivationScan:
    scan = ActivationScan(loaded)
    scan.run(sequences, batch_size)
    return scan


@torch.no_grad()
def brute_force(loaded: LoadedModel, sequences: list[list[int]]) -> Stack:
    """Every block output of every sequence, alone and unpadded, from HF's own tuple.

    ``hidden_states[k]`` is the input of block k; only the last block needs a hook, because the
    tuple's last entry has gone through the final norm.
    """
    stack: Stack = {k: [] for k in range(EMBEDDING, len(loaded.decoder))}
    last = len(loaded.decoder) - 1

    def see(_module: torch.nn.Module, _args: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        stack[last].append(hidden[0].float().cpu())

    handle = loaded.decoder.blocks[-1].register_forward_hook(see)
    for sequence in sequences:
        ids = torch.tensor([sequence], device=loaded.device)
        states = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
        for k in range(EMBEDDING, last):
            stack[k].append(states[k + 1][0].float().cpu())
    handle.remove()
    return stack


def assert_equals(scan: ActivationScan, stack: Stack, rtol: float) -> None:
    """Every statistic of the scan is the one of the stored outputs."""
    table = scan.layers().set_index("layer")
    channels = scan.channels()
    channels = channels[channels["part"] == "block_output"]
    assert list(table.index) == sorted(stack)
    for layer, parts in stack.items():
        row, every = table.loc[layer], torch.cat(parts)
        magnitudes = every.abs().flatten()
        top = magnitudes.topk(3).values.tolist()
        assert [row[f"top{r}"] for r in (1, 2, 3)] == pytest.approx(top, rel=rtol)
        for rank in (1, 2, 3):
            place = [int(row[f"top{rank}_{n}"]) for n in ("sequence", "position", "channel")]
            value = float(parts[place[0]][place[1], place[2]])
            assert value == pytest.approx(row[f"top{rank}_value"], rel=rtol)
            assert abs(value) == pytest.approx(row[f"top{rank}"], rel=rtol)
        assert row["mean"] == pytest.approx(float(magnitudes.double().mean()), rel=rtol)
        assert row["median"] == pytest.approx(float(magnitudes.median()), rel=MEDIAN)
        assert row["nonfinite"] == 0
        if layer != EMBEDDING:
            own = channels[channels["layer"] == layer].sort_values("channel")["magnitude"]
            np.testing.assert_allclose(own, every.abs().amax(0), rtol=rtol)


LENGTHS = [17, 4, 31, 9, 1, 23, 12, 5, 28, 2]


def test_scan_of_the_bundled_model_equals_brute_force(demo: LoadedModel) -> None:
    sequences = random_sequences(LENGTHS)
    stack = brute_force(demo, sequences)
    for batch_size in (1, 3, len(sequences)):
        scan = scan_of(demo, sequences, batch_size)
        # Alone, a sequence gives the very same numbers; in a batch, other kernels may be used.
        assert_equals(scan, stack, rtol=1e-6 if batch_size == 1 else 1e-4)
        assert (scan.n_sequences, scan.n_tokens) == (len(LENGTHS), sum(LENGTHS))


def test_token_table_is_the_largest_magnitude_of_every_token(demo: LoadedModel) -> None:
    sequences = random_sequences(LENGTHS)
    stack = brute_force(demo, sequences)
    table = scan_of(demo, sequences, 4).tokens()
    kept = sequences[:8]
    assert len(table) == sum(map(len, kept)) * len(demo.decoder)
    assert list(table.columns) == [
        "sequence",
        "position",
        "token",
        "layer",
        "magnitude",
        "channel",
    ]
    for row in table.itertuples():
        state = stack[row.layer][row.sequence][row.position].abs()
        assert row.magnitude == pytest.approx(float(state.max()), rel=1e-4)
        assert float(state[row.channel]) == pytest.approx(row.magnitude, rel=1e-4)
        assert row.token == demo.tokenizer.decode([sequences[row.sequence][row.position]])


def test_order_of_the_sequences_moves_only_the_places(demo: LoadedModel) -> None:
    sequences = random_sequences(LENGTHS)
    forward = scan_of(demo, sequences, 4).layers()
    backward = scan_of(demo, sequences[::-1], 4).layers()
    for name in ("top1", "top2", "top3", "mean"):
        np.testing.assert_allclose(forward[name], backward[name], rtol=1e-4)
    np.testing.assert_array_equal(forward["top1_channel"], backward["top1_channel"])
    np.testing.assert_array_equal(
        forward["top1_sequence"], len(LENGTHS) - 1 - backward["top1_sequence"]
    )


def test_half_precision_statistics_are_those_of_the_half_precision_outputs() -> None:
    """The model's own bf16 numbers, summed in float64: nothing is rounded a second time."""
    loaded = load(ModelFields(device="cpu", dtype="bfloat16"))
    sequences = random_sequences([9, 9])
    assert_equals(scan_of(loaded, sequences, 1), brute_force(loaded, sequences), rtol=1e-6)


floats = st.floats(min_value=2.0**-100, max_value=2.0**60, width=32, allow_nan=False) | st.just(0.0)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.tuples(floats, st.booleans()), min_size=2, max_size=60),
    cuts=st.lists(st.integers(1, 29), max_size=4),
)
def test_statistics_do_not_depend_on_how_they_are_fed(
    values: list[tuple[float, bool]], cuts: list[int]
) -> None:
    signed = [-v if negative else v for v, negative in values[: len(values) // 2 * 2]]
    states = torch.tensor(signed).view(-1, 2)
    tokens = torch.arange(len(states))
    statistics = Statistics(2, torch.device("cpu"), by_channel=True)
    edges = sorted({0, len(states), *(c for c in cuts if c < len(states))})
    for start, stop in zip(edges, edges[1:], strict=False):
        part = slice(start, stop)
        statistics.add(states[part], tokens[part])
    flat = states.abs().flatten()
    order = flat.sort(descending=True, stable=True).indices[:3].tolist()
    row = statistics.row()
    assert [row[f"top{r}"] for r in (1, 2, 3)][: len(order)] == flat[order].tolist()
    # Equal magnitudes: the earliest place.
    wanted = [(*divmod(i, 2), float(states.flatten()[i])) for i in order]
    assert statistics.places() == wanted
    assert row["median"] == pytest.approx(float(flat.median()), rel=MEDIAN, abs=1e-38)
    assert row["mean"] == pytest.approx(float(flat.double().mean()), rel=1e-12)
    assert torch.equal(statistics.channel_max, states.abs().amax(0))
    assert torch.equal(statistics.channel_tokens, (states.abs() >= 6).sum(0))
    assert row["above6"] == float((flat >= 6).double().mean())


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True), min_size=3, max_size=30),
    offset=st.integers(0, 1000),
)
def test_nonfinite_entries_are_counted_and_left_out(values: list[float], offset: int) -> None:
    """Whatever is not finite, even everything: the rest has the statistics of the rest."""
    states = torch.tensor(values)[:, None]
    tokens = torch.arange(len(states)) + offset
    mixed, rest = (Statistics(1, torch.device("cpu")) for _ in range(2))
    mixed.add(states, tokens)
    finite = states[:, 0].isfinite()
    rest.add(states[finite], tokens[finite])
    assert mixed.places() == rest.places()
    broken = tokens[~finite].tolist()
    assert mixed.broken_token() == (broken[0] if broken else None)
    row, clean = mixed.row(), rest.row()
    assert row.pop("nonfinite") == len(broken)
    assert clean.pop("nonfinite") == 0
    assert row == pytest.approx(clean, nan_ok=True, rel=1e-12)


def tiny(folder: Path, family: str, plant: Plant | None) -> LoadedModel:
    return load(ModelFields(model=str(save(build(family, plant), folder)), device="cpu"))


BROKEN = 3
"""The layer whose weights are broken."""


def broken(folder: Path, layer: int = BROKEN) -> Path:
    """A Llama whose blocks give NaN from a layer on, as half precision does when it overflows."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight.mul_(float("inf"))
    return save(model, folder)


def test_nan_layers_are_counted_and_leave_the_others_alone(tmp_path: Path) -> None:
    sequences = random_sequences([6, 9])
    loaded = load(ModelFields(model=str(broken(tmp_path / "broken")), device="cpu"))
    table = scan_of(loaded, sequences, 2).layers().set_index("layer")
    healthy = scan_of(tiny(tmp_path / "healthy", "llama", None), sequences, 2).layers()
    every = sum(map(len, sequences)) * HIDDEN
    assert (table.loc[: BROKEN - 1, "nonfinite"] == 0).all()
    assert (table.loc[BROKEN:, "nonfinite"] == every).all()
    below = list(range(EMBEDDING, BROKEN))
    columns = ["top1", "top2", "top3", "median", "mean"]
    pd.testing.assert_frame_equal(
        table.loc[below, columns], healthy.set_index("layer").loc[below, columns]
    )


@pytest.mark.parametrize(
    "name",
    [
        "top1",
        "top3",
        "top1_channel",
        "median",
        "mean",
    ],
)
def test_nan_sequence_leaves_the_statistics_of_the_others(tmp_path: Path, name: str) -> None:
    """One of two sequences is NaN throughout: the numbers are those of the other one."""
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[PLANT.token] = float("nan")
    loaded = load(ModelFields(model=str(save(model, tmp_path)), device="cpu"))
    sequences = random_sequences([6, 9])
    clean = scan_of(loaded, sequences[:1], 1).layers().set_index("layer")
    sequences[1][0] = PLANT.token  # seen by every later token
    table = scan_of(loaded, sequences, 1).layers().set_index("layer")
    assert (table.loc[0:, "nonfinite"] == len(sequences[1]) * HIDDEN).all()
    np.testing.assert_allclose(table.loc[0:, name], clean.loc[0:, name], rtol=1e-5)


@pytest.mark.parametrize("layer", [0, BROKEN])
def test_nan_is_reported_and_the_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    monkeypatch.setattr(zo_settings(), "cache_dir", tmp_path / "cache")
    model = str(broken(tmp_path / "model", layer))
    job = ScanJob(model=model, device="cpu", text="prompt", prompt="The harbour was quiet.")
    run = runs.create(job, Process.current())
    run_scan(job, run, JobContext(run))
    for k in range(LAYERS):
        said = f"layer {k} has " in run.log_text()
        assert said == (k >= layer), run.log_text()
    assert "NaN or infinite activations" in run.log_text()
    summary = run.result_json()
    assert summary is not None
    assert summary["first_outlier_layer"] == dict.fromkeys(RULES)
    assert [m is None for m in summary["top1"]] == [k >= layer for k in range(LAYERS)]
    assert list(pd.read_parquet(run.result("layers.parquet"))["layer"]) == [-1, *range(LAYERS)]
