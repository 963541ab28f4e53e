"""The CUDA kernel of the statistics against the plain code: exact but for the order of sums."""

import math

import pytest
import torch

from zo_core.analysis.kernels import statistics as kernels
from zo_core.analysis.statistics import INFINITE, Statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
SHAPES = [(1, 1), (3, 7), (513, 96), (1000, 4096), (64, 11008), (8192, 256), (5, 4099)]


def both(states: torch.Tensor, pieces: int = 1) -> tuple[Statistics, Statistics]:
    """Statistics by the kernel, and by the plain code on the CPU."""
    ours = Statistics(states.shape[1], torch.device("cuda"), by_channel=True)
    plain = Statistics(states.shape[1], torch.device("cpu"), by_channel=True)
    start = 0
    for piece in states.tensor_split(pieces):
        ours.add(piece.cuda(), start)
        plain.add(piece, start)
        start += len(piece)
    return ours, plain


def assert_equal(ours: Statistics, plain: Statistics) -> None:
    found = ours.histogram.cpu()
    assert torch.equal(found[:INFINITE], plain.histogram[:INFINITE])
    assert found[INFINITE:].sum() == plain.histogram[INFINITE:].sum()  # NaNs have many patterns
    assert ours.places() == plain.places()
    assert ours.broken_token() == plain.broken_token()
    assert torch.equal(ours.channel_max.cpu(), plain.channel_max)
    assert torch.equal(ours.channel_tokens.cpu(), plain.channel_tokens)
    for name, value in plain.row().items():
        assert ours.row()[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def test_kernel_compiles() -> None:
    """Or every scan on this GPU would be slow without a word."""
    assert kernels.why_not(0) == ""
    assert kernels.usable(torch.zeros(2, 2, device="cuda"))


@pytest.mark.parametrize("dtype", list(kernels.ELEMENTS))
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_the_plain_code(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(math.prod(shape))
    states = (torch.randn(shape, generator=generator) * 5).to(dtype)
    assert_equal(*both(states))
    assert_equal(*both(states, pieces=3))


@pytest.mark.parametrize("dtype", list(kernels.ELEMENTS))
def test_nonfinite_entries_and_ties(dtype: torch.dtype) -> None:
    states = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    states[40:60, 3] = 9.0
    states[200, 8], states[200, 9] = -9.0, 9.0
    states[7, 60], states[123, 5], states[299, 63] = math.nan, math.inf, -math.inf
    assert_equal(*both(states, pieces=2))
    assert_equal(*both(torch.zeros(40, 8, dtype=dtype)))
    assert_equal(*both(torch.full((40, 8), math.nan, dtype=dtype)))
