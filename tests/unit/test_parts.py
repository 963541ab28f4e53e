"""Statistics of every part equal a computation that stores everything, in every family."""

import math
import random
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from tests.unit.planted import FAMILIES, LAYERS, MOE, Plant, build, in_memory
from zo_core.analysis.activations import ActivationScan
from zo_core.analysis.statistics import ABOVE, QUANTILES
from zo_core.analysis.weights import MULTIPLES
from zo_core.models.load import LoadedModel

BOUND = 4e-3
"""The stated relative accuracy of quantiles."""
PLANT = Plant(layer=2, token=4242, channel=19)
LENGTHS = (5, 1, 7, 9)
DOWN = "mlp.down_proj"
NAMES = {
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt-j": ("attn.out_proj", "mlp.fc_out"),
    "gpt-neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "opt-post-ln": ("self_attn.out_proj", "fc2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
}
"""Attention's output projection and down-projection, where they are not LLaMA's."""
Rows = dict[tuple[int, str], list[list[tuple[int, int, torch.Tensor]]]]
"""(layer, part) -> for each sequence, (token, channel of the first entry, entries) by row."""


def sequences() -> list[list[int]]:
    draw = random.Random(5)
    ids = [[draw.randrange(2, 4000) for _ in range(n)] for n in LENGTHS]
    ids[3][6] = PLANT.token
    return ids


@torch.no_grad()
def stored(loaded: LoadedModel, family: str, ids: list[list[int]]) -> Rows:
    """Every part of every block, each sequence alone and unpadded, by the family's own names."""
    found: Rows = defaultdict(list)
    attention, down = NAMES.get(family, ("self_attn.o_proj", DOWN))
    handles = []
    for layer, block in enumerate(loaded.decoder.blocks):

        def keep(part: str, states: torch.Tensor, layer: int = layer) -> None:
            rows = states.reshape(-1, states.shape[-1]).clone()  # Falcon adds in place
            found[layer, part].append([(t, 0, row) for t, row in enumerate(rows)])

        def whole(_m: nn.Module, _a: object, output: object, keep=keep) -> None:
            keep("block_output", output[0] if isinstance(output, tuple) else output)

        def mixed(_m: nn.Module, _a: object, output: torch.Tensor, keep=keep) -> None:
            keep("attention_output", output)

        handles.append(block.register_forward_hook(whole))
        handles.append(block.get_submodule(attention).register_forward_hook(mixed))
        experts = next((m for n, m in block.named_modules() if n.endswith(".experts")), None)
        if experts is None:

            def linear(_m: nn.Module, args: tuple, output: torch.Tensor, keep=keep) -> None:
                keep("down_input", args[0])
                keep("mlp_output", output)

            handles.append(block.get_submodule(down).register_forward_hook(linear))
            continue

        def routed(m: nn.Module, args: tuple, _o: object, layer: int = layer) -> None:
            hidden, index = args[:2]
            rows = []
            for token, chosen in enumerate(index.tolist()):
                for expert in chosen:
                    gate, up = (m.gate_up_proj[expert] @ hidden[token]).chunk(2)
                    rows.append((token, expert * m.down_proj.shape[2], m.act_fn(gate) * up))
            found[layer, "down_input"].append(rows)

        def mlp(_m: nn.Module, _a: object, output: torch.Tensor, keep=keep) -> None:
            keep("mlp_output", output)

        handles.append(experts.register_forward_hook(routed))
        handles.append(block.mlp.register_forward_hook(mlp))
        shared = getattr(block.mlp, "shared_expert", None)
        if shared is not None:
            # Runs before the experts: its rows are moved behind theirs below.
            first = experts.down_proj.shape[0] * experts.down_proj.shape[2]

            def of_shared(
                _m: nn.Module, args: tuple, _o: object, layer: int = layer, first: int = first
            ) -> None:
                found[layer, "shared"].append([(t, first, r) for t, r in enumerate(args[0])])

            handles.append(shared.down_proj.register_forward_hook(of_shared))
    for sequence in ids:
        loaded.model(input_ids=torch.tensor([sequence]), use_cache=False)
    for handle in handles:
        handle.remove()
    for layer in range(LAYERS):
        extra = found.pop((layer, "shared"), [[] for _ in ids])
        found[layer, "down_input"] = [
            a + b for a, b in zip(found[layer, "down_input"], extra, strict=True)
        ]
    return found


def exact(rows: list[list[tuple[int, int, torch.Tensor]]]) -> dict[str, float]:
    """Every statistic of stored rows, the plain way."""
    values = torch.cat([x for sequence in rows for _, _, x in sequence]).double()
    magnitude = values.abs()
    ordered = magnitude.sort().values
    n = len(values)
    found = {name: float(ordered[math.ceil(p * n / 1000) - 1]) for name, p in QUANTILES.items()}
    central = values - values.mean()
    return found | {
        "mean": float(magnitude.mean()),
        "rms": float(values.square().mean().sqrt()),
        "kurtosis": float((central**4).mean() / (central**2).mean() ** 2),
        "count": n,
        **{name: float((magnitude >= t).double().mean()) for name, t in ABOVE.items()},
    }


def largest(rows: list[list[tuple[int, int, torch.Tensor]]]) -> list[tuple]:
    """(signed value, sequence, position, channel) of the three largest magnitudes."""
    entries = [
        (-abs(v), s, t, first + c, v)
        for s, sequence in enumerate(rows)
        for t, first, x in sequence
        for c, v in enumerate(x.tolist())
    ]
    return [(v, s, t, c) for _, s, t, c, v in sorted(entries)[:3]]


def entry(
    rows: list[list[tuple[int, int, torch.Tensor]]], sequence: int, position: int, channel: int
) -> float:
    """The stored entry at a place."""
    return next(
        float(x[channel - first])
        for t, first, x in rows[sequence]
        if t == position and first <= channel < first + len(x)
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_part_equals_brute_force(family: str) -> None:
    loaded = in_memory(build(family, PLANT))
    ids = sequences()
    brute = stored(loaded, family, ids)
    alone, padded = ActivationScan(loaded), ActivationScan(loaded)
    alone.run(ids, batch_size=1)
    padded.run(ids, batch_size=3)
    tables = [
        (scan.parts().set_index(["layer", "part"]), rtol)
        for scan, rtol in ((alone, 1e-5 if family in MOE else 0.0), (padded, 2e-4))
    ]
    assert set(tables[0][0].index) == {*brute, (-1, "block_output")}
    for key, rows in brute.items():
        wanted, top = exact(rows), largest(rows)
        for table, rtol in tables:
            row = table.loc[key]
            for rank, (value, sequence, position, channel) in enumerate(top, start=1):
                assert row[f"top{rank}_value"] == pytest.approx(value, rel=rtol, abs=0)
                assert row[f"top{rank}"] == abs(row[f"top{rank}_value"])
                place = [int(row[f"top{rank}_{n}"]) for n in ("sequence", "position", "channel")]
                if rtol:  # rounding may swap near equals
                    assert entry(rows, *place) == pytest.approx(row[f"top{rank}_value"], rel=rtol)
                else:
                    assert place == [sequence, position, channel], (key, rank)
            assert row["count"] == wanted["count"]
            assert row["nonfinite"] == 0
            for name in ("mean", "rms", "kurtosis"):
                assert row[name] == pytest.approx(wanted[name], rel=max(rtol, 1e-6)), (key, name)
            for name in QUANTILES:
                bound = BOUND + rtol * 50
                assert row[name] == pytest.approx(wanted[name], rel=bound, abs=1e-7), (key, name)
            for name in ABOVE:
                assert row[name] == pytest.approx(wanted[name], abs=rtol * 10), (key, name)
    for scan, (_, rtol) in zip((alone, padded), tables, strict=True):
        check_channels(scan.channels(), brute, rtol)


def check_channels(channels: pd.DataFrame, brute: Rows, rtol: float) -> None:
    """Every channel of every part, once, in order; those of experts are too many to be kept."""
    kept = sorted(
        key
        for key, rows in brute.items()
        if not any(first for sequence in rows for _, first, _ in sequence)  # not of experts
    )
    groups = dict(list(channels.groupby(["layer", "part"], observed=True)))
    assert sorted(groups) == kept
    for key in kept:
        rows = torch.stack([x for sequence in brute[key] for _, _, x in sequence]).abs()
        own = groups[key]
        assert own["channel"].tolist() == list(range(rows.shape[1]))
        # A channel that is near zero is as inexact as its large neighbours.
        near = rtol * float(rows.max())
        np.testing.assert_allclose(own["magnitude"], rows.amax(0), rtol=rtol, atol=near)
        if not rtol:
            assert own["tokens6"].tolist() == (rows >= 6).sum(0).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "qwen2-moe"])
def test_weights_and_wanda_shares_equal_brute_force(family: str) -> None:
    """From the weights and inputs of every linear layer, stored."""
    loaded = in_memory(build(family, PLANT))
    ids = sequences()
    scan = ActivationScan(loaded)
    scan.run(ids, batch_size=2)
    brute = stored(loaded, family, ids)
    for layer in (0, PLANT.layer):
        rows = scan.weights().query(f"layer == {layer}")
        block = loaded.decoder.blocks[layer]
        for row, weight in zip(rows.to_dict("records"), down_weights(block, family), strict=True):
            check_weight(row, weight)
        if family not in MOE:
            assert shares(scan, layer) == pytest.approx(wanda(loaded, layer, ids), rel=1e-3)
            width = {len(x) for seq in brute[layer, "down_input"] for _, _, x in seq}
            assert width == {int(rows["inputs"].iloc[0])}
    planted = scan.weights().query(f"layer == {PLANT.layer}").iloc[0]
    assert (planted["top1_row"], planted["top1_column"]) == (PLANT.channel, 7)
    assert planted["column_top1_column"] == 7
    assert planted["row_top1_row"] == PLANT.channel


def down_weights(block: nn.Module, family: str) -> list[torch.Tensor]:
    if family in MOE:
        return [*block.mlp.experts.down_proj, block.mlp.shared_expert.down_proj.weight]
    weight = block.get_submodule(NAMES.get(family, ("", DOWN))[1]).weight
    return [weight.T if family == "gpt2" else weight]


def check_weight(row: dict[str, float], weight: torch.Tensor) -> None:
    flat = weight.abs().flatten()
    top = flat.sort(descending=True, stable=True)
    for rank in (1, 2, 3):
        output, column = divmod(int(top.indices[rank - 1]), weight.shape[1])
        assert row[f"top{rank}_value"] == float(weight[output, column])
        assert (row[f"top{rank}_row"], row[f"top{rank}_column"]) == (output, column)
    assert row["median"] == pytest.approx(float(flat.median()), rel=BOUND)
    assert row["mean"] == pytest.approx(float(flat.mean()), rel=1e-5)
    columns = weight.square().mean(0).sqrt()
    assert row["column_top1"] == pytest.approx(float(columns.max()), rel=1e-5)
    assert row["column_median"] == pytest.approx(float(columns.median()), rel=1e-5)
    assert (row["outputs"], row["inputs"]) == tuple(weight.shape)


@torch.no_grad()
def wanda(loaded: LoadedModel, layer: int, ids: list[list[int]]) -> dict[int, float]:
    """Shares of stored scores |W| x norm of the input channel above m x their mean."""
    inputs: dict[nn.Module, list[torch.Tensor]] = defaultdict(list)
    handles = [
        m.register_forward_hook(lambda m, a, _o: inputs[m].append(a[0].reshape(-1, a[0].shape[-1])))
        for m in loaded.decoder.blocks[layer].modules()
        if type(m).__name__ in {"Linear", "Conv1D", "FalconLinear"}
    ]
    for sequence in ids:
        loaded.model(input_ids=torch.tensor([sequence]), use_cache=False)
    for handle in handles:
        handle.remove()
    scores = []
    for module, seen in inputs.items():
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        scores.append((weight.abs() * torch.cat(seen).norm(dim=0)).flatten())
    every = torch.cat(scores)
    return {m: float((every > m * every.mean()).double().mean()) for m in MULTIPLES}


def shares(scan: ActivationScan, layer: int) -> dict[int, float]:
    table: pd.DataFrame = scan.owl().query(f"layer == {layer}")
    return dict(zip(table["m"], table["share"], strict=True))
