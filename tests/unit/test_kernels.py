"""The fused CUDA kernels against the CPU's noise and plain torch arithmetic."""

import pytest
import torch

from zo_core.zo.noise import key, perturbation

pytestmark = pytest.mark.gpu
SHAPES = [(1,), (3, 5), (1024,), (257, 129)]


@pytest.fixture(scope="module")
def kernels() -> object:
    """The kernels, where they can run."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    from zo_core.zo.kernels import noise

    return noise


def _keys() -> torch.Tensor:
    values = [key(1, 2, "other"), key(7, 3, "weight")]
    return torch.tensor(values, dtype=torch.uint64).view(torch.int64).cuda()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_z_is_the_cpu_s(kernels: object, kind: str, shape: tuple[int, ...]) -> None:
    """Rademacher bit for bit, Gaussian to float32 rounding."""
    out = torch.empty(shape, device="cuda")
    kernels.make(kind, out, _keys(), 1)
    wanted = perturbation(kind, 7, 3, "weight", shape, "cpu")
    tolerance = 0.0 if kind == "rademacher" else 2e-6
    torch.testing.assert_close(out.cpu(), wanted, rtol=tolerance, atol=tolerance)


def test_gaussian_tails_are_finite(kernels: object) -> None:
    """Every value of a long stream is finite, and its moments are those of a normal."""
    out = torch.empty(1 << 26, device="cuda")
    kernels.make("gaussian", out, _keys(), 0)
    assert bool(out.isfinite().all())
    assert abs(float(out.mean())) < 6 / (1 << 13)
    assert abs(float(out.var()) - 1) < 6 * 2**0.5 / (1 << 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pair_and_step(
    kernels: object, kind: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """What they write is one rounding of the float32 expression."""
    master = torch.randn(shape, device="cuda")
    plus, minus, working = (torch.empty(shape, device="cuda", dtype=dtype) for _ in range(3))
    keys, alpha = _keys(), torch.tensor(-0.25, device="cuda")
    z = torch.empty(shape, device="cuda")
    kernels.make(kind, z, keys, 1)
    kernels.perturb_pair(kind, master, plus, minus, keys, 1, 0.5)
    # eps and alpha are powers of two, so that a fused multiply-add rounds as two operations do
    assert torch.equal(plus, (master + 0.5 * z).to(dtype))
    assert torch.equal(minus, (master - 0.5 * z).to(dtype))
    kernels.perturb(kind, master, working, keys, 1, -0.5)
    assert torch.equal(working, minus)
    before = master.clone()
    fused, up, down = master.clone(), torch.empty_like(plus), torch.empty_like(minus)
    kernels.step_pair(kind, fused, up, down, keys, keys.flip(0).contiguous(), 1, alpha, 0.5)
    kernels.step(kind, master, working, keys, 1, alpha)
    assert torch.equal(master, before - 0.25 * z)
    assert torch.equal(working, master.to(dtype))
    kernels.perturb_pair(kind, master, plus, minus, keys, 0, 0.5)
    assert torch.equal(fused, master)
    assert torch.equal(up, plus)
    assert torch.equal(down, minus)
