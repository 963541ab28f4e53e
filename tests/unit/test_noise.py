"""Counter-based noise: known answers, statistics, and independence of everything but its key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_core.zo import noise
from zo_core.zo.noise import perturbation, philox

MASK = 0xFFFFFFFF


def test_philox_known_answer() -> None:
    """The published test vector of Philox4x32-10 for a zero key and counter (Random123)."""
    words = philox(0, torch.zeros(1, dtype=torch.int64))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def _scalar_philox(key: int, counter: int) -> list[int]:
    """The algorithm in Python integers, one counter at a time."""
    c = [counter, 0, 0, 0]
    k = [key & MASK, key >> 32]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


@given(key=st.integers(0, 2**64 - 1), counter=st.integers(0, MASK))
@settings(max_examples=50, deadline=None)
def test_philox_equals_scalar_arithmetic(key: int, counter: int) -> None:
    """int64 tensors that wrap give the same words as unbounded integers."""
    words = philox(key, torch.tensor([counter]))
    assert [int(w) for w in words] == _scalar_philox(key, counter)


@pytest.mark.parametrize(("kind", "fourth"), [("gaussian", 3.0), ("rademacher", 1.0)])
def test_moments(kind: str, fourth: float) -> None:
    """Mean 0, variance 1 and the right fourth moment, each within five standard errors."""
    n = 2_000_000
    z = perturbation(kind, seed=1, step=2, name="w", shape=(n,)).double()
    assert abs(float(z.mean())) < 5 / n**0.5
    assert abs(float((z**2).mean()) - 1) <= 5 * ((fourth - 1) / n) ** 0.5
    assert abs(float((z**4).mean()) - fourth) <= 5 * (96 / n) ** 0.5


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(1, 10**7),
)
@settings(max_examples=25, deadline=None)
def test_a_prefix_of_a_longer_parameter(kind: str, shape: list[int], seed: int, step: int) -> None:
    """z[i] depends on the index alone: a longer parameter of the same name starts the same."""
    small = perturbation(kind, seed, step, "w", shape)
    large = perturbation(kind, seed, step, "w", (1000,))
    assert torch.equal(small.flatten(), large[: small.numel()])


def test_every_part_of_the_key_matters() -> None:
    """Seed, step, direction and name each give unrelated numbers."""
    base = perturbation("gaussian", 0, 1, "w", (10_000,))
    for other in (
        perturbation("gaussian", 1, 1, "w", (10_000,)),
        perturbation("gaussian", 0, 2, "w", (10_000,)),
        perturbation("gaussian", 0, 1, "w", (10_000,), direction=1),
        perturbation("gaussian", 0, 1, "v", (10_000,)),
    ):
        assert abs(float((base * other).mean())) < 5 / 100


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk that bounds memory has no influence on the numbers."""
    whole = perturbation("gaussian", 3, 4, "w", (10_007,))
    monkeypatch.setattr(noise, "_CHUNK", 512)
    assert torch.equal(perturbation("gaussian", 3, 4, "w", (10_007,)), whole)


def test_thread_count_does_not_show() -> None:
    """One thread and several give the same bits."""
    threads = torch.get_num_threads()
    several = perturbation("gaussian", 3, 4, "w", (300_001,))
    torch.set_num_threads(1)
    try:
        assert torch.equal(perturbation("gaussian", 3, 4, "w", (300_001,)), several)
    finally:
        torch.set_num_threads(threads)


def test_unknown_kind_lists_the_choices() -> None:
    """A wrong name is answered with the right ones."""
    with pytest.raises(ValueError, match="gaussian, rademacher"):
        perturbation("cauchy", 0, 1, "w", (1,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cpu_and_gpu_agree() -> None:
    """Rademacher bit for bit, Gaussian to a few float32 roundings."""
    for kind in ("gaussian", "rademacher"):
        here = perturbation(kind, 5, 6, "w", (1_000_003,))
        there = perturbation(kind, 5, 6, "w", (1_000_003,), "cuda").cpu()
        if kind == "rademacher":
            assert torch.equal(here, there)
        else:
            torch.testing.assert_close(here, there, rtol=2e-6, atol=2e-6)
