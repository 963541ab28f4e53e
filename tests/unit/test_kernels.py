"""The fused CUDA kernels against the CPU's noise and plain torch arithmetic."""

import pytest
import torch

from zo_core.zo.noise import key, perturbation
from zo_core.zo.points import Owed, fusible, move_to, step_along, write_points
from zo_core.zo.scope import Draw, Point, TunedScope

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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_all_tensors_of_a_scope(kernels: object, kind: str, masked: bool) -> None:
    """What a launch writes is one rounding of the float32 expression, for every tensor."""
    sizes = [1, 15, 1024, 33153, 4096, 2064]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    parameters = {
        f"{dtype}{n}": torch.randn(n, device="cuda").to(dtype) for dtype in dtypes for n in sizes
    }
    masks = {n: torch.rand_like(p.float()) < 0.4 for n, p in parameters.items() if "5" in n}
    scope = TunedScope(parameters, masks if masked else {})
    assert fusible(scope, kind)
    here, there = Draw(kind, 7, 3), Draw(kind, 7, 4)
    z = {
        draw: {n: scope.z(n, draw).clone() for n in parameters} for draw in (here, there)
    }  # eps and alpha are powers of two: a fused multiply-add rounds as two operations do
    out = {n: [torch.empty_like(p), torch.empty_like(p)] for n, p in parameters.items()}
    write_points(scope, [Point(here, 0.5), Point(here, -0.5)], out)
    master = scope.snapshot()
    for name, (plus, minus) in out.items():
        assert torch.equal(plus, (master[name] + 0.5 * z[here][name]).to(plus.dtype)), name
        assert torch.equal(minus, (master[name] - 0.5 * z[here][name]).to(plus.dtype)), name
    move_to(scope, Point(here, -0.5))
    assert all(torch.equal(p, out[n][1]) for n, p in parameters.items())
    alpha = torch.tensor(-0.25, device="cuda")
    write_points(scope, [Point(there, 0.5), Point(there, -0.5)], out, Owed(here, alpha))
    for name, (plus, minus) in out.items():
        stepped = master[name] - 0.25 * z[here][name]
        assert torch.equal(scope.master[name], stepped), name
        assert torch.equal(plus, (stepped + 0.5 * z[there][name]).to(plus.dtype)), name
        assert torch.equal(minus, (stepped - 0.5 * z[there][name]).to(plus.dtype)), name
    scope.load(master)
    step_along(scope, here, alpha)
    for name, parameter in parameters.items():
        stepped = master[name] - 0.25 * z[here][name]
        assert torch.equal(scope.master[name], stepped), name
        assert torch.equal(parameter, stepped.to(parameter.dtype)), name


def test_a_scope_takes_a_launch_a_dtype(kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors it has."""
    scope = TunedScope({f"p{i}": torch.randn(64, device="cuda") for i in range(100)})
    launches, launch = [], kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *a: (launches.append(a), launch(*a)))
    move_to(scope, Point(Draw("gaussian", 0, 1), 0.5))
    step_along(scope, Draw("gaussian", 0, 1), torch.zeros((), device="cuda"))
    assert len(launches) == 2
