"""The attention kernel against attention written out, segment by segment, in float64."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zo_core.bench.attention import time_attention
from zo_core.bench.shapes import LENGTHS
from zo_core.zo.last_block import _queries_at
from zo_core.zo.packing import Packing, pack, shared_start

pytestmark = pytest.mark.gpu
ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Norm of the error, relative: inputs are exact, sums float32, shares and the result rounded."""


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    """A GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")


def _packing(seed: int, longest: int, shared: bool) -> Packing:
    """Segments of 1 to ``longest`` tokens; if asked for, candidates share a prompt, all a start."""
    draw = random.Random(seed)  # noqa: S311 - a reproducible draw
    groups = []
    for _ in range(7):
        prompt = [draw.randrange(99) for _ in range(draw.randint(1, longest))]
        answers = range(3 if shared else 1)
        rows = [prompt + [100 + a] * draw.randint(1, 5) for a in answers]
        groups.append([(*range(3), *row) if shared else tuple(row) for row in rows])
    return pack(groups, torch.device("cuda"), shared_start(groups))[2]


def _states(packing: Packing, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[heads, T, D], laid out as a model's projections are."""
    return torch.randn(packing.tokens, heads, width, device="cuda").to(dtype).transpose(0, 1)


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Float64 [T, heads, D]."""
    query, key, value = (x.double() for x in (query, key, value))
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    out = torch.zeros_like(query)
    first = 0
    for length, keys in zip(packing.query_lengths, packing.keys, strict=True):
        for number in range(length):
            end = len(keys) - length + number + 1
            seen = list(keys[max(0, end - window) if window else 0 : end])
            scores = torch.einsum("hd,hkd->hk", query[:, first + number], key[:, seen]) * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            shares = scores.softmax(-1)
            out[:, first + number] = torch.einsum("hk,hkd->hd", shares, value[:, seen])
        first += length
    return out.transpose(0, 1)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"),
    [(4, 4, 64), (6, 2, 128), (8, 1, 80), (14, 2, 32), (11, 1, 64), (32, 2, 16), (2, 1, 256)],
)
@pytest.mark.parametrize(
    ("longest", "window", "softcap"), [(1, 0, 0.0), (12, 0, 0.0), (90, 0, 5.0), (90, 7, 0.0)]
)
def test_it_is_attention(
    dtype: torch.dtype,
    shared: bool,
    heads: int,
    key_heads: int,
    width: int,
    longest: int,
    window: int,
    softcap: float,
) -> None:
    """Whatever the heads, lengths, window and cap, and whether or not candidates share a prompt."""
    from zo_core.zo.kernels.attention import attend

    torch.manual_seed(longest + heads)
    packing = _packing(longest + width, longest, shared)
    states = [_states(packing, n, width, dtype) for n in (heads, key_heads, key_heads)]
    got = attend(*states, packing, 0.2, window, softcap)
    assert got.shape == (packing.tokens, heads, width)
    assert got.is_contiguous()
    wanted = _written_out(*states, packing, 0.2, window, softcap)
    assert float((got.double() - wanted).norm() / wanted.norm()) < ERROR[dtype]


@pytest.mark.parametrize("shared", [False, True])
def test_some_queries_give_what_all_give(shared: bool) -> None:
    """As in the last block: scored tokens alone, whose keys lie where the whole row's do."""
    from zo_core.zo.kernels.attention import attend

    packing = _packing(5, 40, shared)
    query, key, value = (_states(packing, n, 64, torch.float32) for n in (4, 2, 2))
    places = torch.randperm(packing.tokens, device="cuda")[:30]
    some = attend(query[:, places], key, value, _queries_at(packing, places), 0.1)
    torch.testing.assert_close(some, attend(query, key, value, packing, 0.1)[places])


@pytest.mark.parametrize("dtype", list(ERROR))
def test_what_has_no_key_is_zero(dtype: torch.dtype) -> None:
    """Empty segments, and the rest of a bucket, which may have more queries than keys."""
    from zo_core.zo.kernels.attention import attend

    query, key = torch.randn(2, 40, 64, device="cuda"), torch.randn(2, 40, 64, device="cuda")
    value = torch.randn(2, 40, 64, device="cuda")
    borders = SimpleNamespace(
        shared=False,
        longest_query=64,
        query_borders=torch.tensor([0, 10, 10, 10, 40], dtype=torch.int32, device="cuda"),
        key_starts=torch.tensor([0, 10, 10, 10], dtype=torch.int32, device="cuda"),
        key_ends=torch.tensor([10, 10, 10, 13], dtype=torch.int32, device="cuda"),
    )
    got = attend(*(x.to(dtype) for x in (query, key, value)), borders, 0.1)
    assert bool(got.isfinite().all())
    assert not got[10:37].any()
    assert bool(got[37:].any(-1).all())
    torch.testing.assert_close(got[37], value[:, 10].to(dtype))


def test_the_benchmark_times_both_kernels(tmp_path: Path) -> None:
    """Every task and head count, in microseconds; without rows, on drawn lengths."""
    found = time_attention(tmp_path)
    assert set(found) == set(LENGTHS)
    assert all(t > 0 for task in found.values() for both in task.values() for t in both.values())
