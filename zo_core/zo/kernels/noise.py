"""Perturb, restore and update in one pass over the fp32 master, making z on the way.

The same z as :mod:`zo_core.zo.noise` - Rademacher bit for bit, Gaussian to float32 rounding - but
never stored: each kernel makes the values it needs from the counter, in registers. Keys and step
sizes are read from device memory, so that launching needs no value from the host.
"""

# mypy: disable-error-code="no-untyped-def"
import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

BLOCK = 1024
"""Values a program makes: 256 counters of Gaussian noise, 8 of Rademacher."""

_TWO_PI = tl.constexpr(2.0 * math.pi * 2.0**-32)


@triton.jit
def _normals(a, b):
    radius = tl.sqrt(-2.0 * libdevice.log((a.to(tl.float32) + 0.5) * 2.3283064365386963e-10))
    angle = b.to(tl.float32) * _TWO_PI
    return radius * libdevice.cos(angle), radius * libdevice.sin(angle)


@triton.jit
def _z(key, block, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """The values [BLOCK] of a block of the stream of a key."""
    width: tl.constexpr = 4 if GAUSSIAN else 128
    count: tl.constexpr = BLOCK // width
    zero = tl.zeros((count,), tl.uint32)
    counter = (block * count + tl.arange(0, count)).to(tl.uint32)
    a, b, c, d = tl.philox(key, counter, zero, zero, zero, n_rounds=10)
    if GAUSSIAN:
        z0, z1 = _normals(a, b)
        z2, z3 = _normals(c, d)
        z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (count, 4, 1))
        bits = (words >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
        z = tl.reshape(bits, (BLOCK,)).to(tl.float32) * 2.0 - 1.0
    return z


@triton.jit
def _make(out, n, keys, which, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    z = _z(tl.load(keys + which), block, GAUSSIAN, BLOCK)
    tl.store(out + at, z, mask=at < n)


@triton.jit
def _point(master, out, n, keys, which, scale, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    z = _z(tl.load(keys + which), block, GAUSSIAN, BLOCK)
    w = tl.load(master + at, mask=at < n)
    tl.store(out + at, tl.fma(z, scale, w).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _pair(master, plus, minus, n, keys, which, eps, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    z = _z(tl.load(keys + which), block, GAUSSIAN, BLOCK)
    w = tl.load(master + at, mask=at < n)
    tl.store(plus + at, tl.fma(z, eps, w).to(plus.dtype.element_ty), mask=at < n)
    tl.store(minus + at, tl.fma(z, -eps, w).to(minus.dtype.element_ty), mask=at < n)


@triton.jit
def _step(
    master,
    working,
    n,
    keys,
    which,
    alpha,
    decay,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,  # noqa: N803
):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    z = _z(tl.load(keys + which), block, GAUSSIAN, BLOCK)
    # The decayed weight is rounded before the step is added, as two torch operations would.
    w = tl.fma(z, tl.load(alpha), tl.load(master + at, mask=at < n) * decay)
    tl.store(master + at, w, mask=at < n)
    tl.store(working + at, w.to(working.dtype.element_ty), mask=at < n)


@triton.jit
def _step_pair(
    master,
    plus,
    minus,
    n,
    keys,
    next_keys,
    which,
    alpha,
    eps,
    GAUSSIAN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    z = _z(tl.load(keys + which), block, GAUSSIAN, BLOCK)
    w = tl.fma(z, tl.load(alpha), tl.load(master + at, mask=at < n))
    tl.store(master + at, w, mask=at < n)
    z = _z(tl.load(next_keys + which), block, GAUSSIAN, BLOCK)
    tl.store(plus + at, tl.fma(z, eps, w).to(plus.dtype.element_ty), mask=at < n)
    tl.store(minus + at, tl.fma(z, -eps, w).to(minus.dtype.element_ty), mask=at < n)


def _grid(values: int) -> tuple[int]:
    return (triton.cdiv(values, BLOCK),)


def make(kind: str, out: torch.Tensor, keys: torch.Tensor, which: int) -> None:
    """Write z.

    Args:
        kind: ``gaussian`` or ``rademacher``.
        out: float32, contiguous.
        keys: int64 [P] on the device, Philox keys.
        which: the key to use.
    """
    n = out.numel()
    with torch.cuda.device(out.device):
        _make[_grid(n)](out, n, keys, which, kind == "gaussian", BLOCK)


def perturb(
    kind: str,
    master: torch.Tensor,
    out: torch.Tensor,
    keys: torch.Tensor,
    which: int,
    scale: float,
) -> None:
    """Write ``master + scale z``, rounded once; arguments as of :func:`perturb_pair`."""
    n = master.numel()
    with torch.cuda.device(master.device):
        _point[_grid(n)](master, out, n, keys, which, scale, kind == "gaussian", BLOCK)


def perturb_pair(
    kind: str,
    master: torch.Tensor,
    plus: torch.Tensor,
    minus: torch.Tensor,
    keys: torch.Tensor,
    which: int,
    eps: float,
) -> None:
    """Write ``master + eps z`` and ``master - eps z``, each rounded once.

    Args:
        kind: see :func:`make`.
        master: float32, contiguous.
        plus: working dtype, contiguous, the master's size.
        minus: the same.
        keys: see :func:`make`.
        which: see :func:`make`.
        eps: perturbation scale.
    """
    n = master.numel()
    with torch.cuda.device(master.device):
        _pair[_grid(n)](master, plus, minus, n, keys, which, eps, kind == "gaussian", BLOCK)


def step_pair(
    kind: str,
    master: torch.Tensor,
    plus: torch.Tensor,
    minus: torch.Tensor,
    keys: torch.Tensor,
    next_keys: torch.Tensor,
    which: int,
    alpha: torch.Tensor,
    eps: float,
) -> None:
    """:func:`step` along one z and :func:`perturb_pair` along the next, reading the master once.

    The working weights themselves are left behind; :func:`step` with alpha 0 brings them up.
    """
    n = master.numel()
    with torch.cuda.device(master.device):
        _step_pair[_grid(n)](
            master, plus, minus, n, keys, next_keys, which, alpha, eps, kind == "gaussian", BLOCK
        )


def step(
    kind: str,
    master: torch.Tensor,
    working: torch.Tensor,
    keys: torch.Tensor,
    which: int,
    alpha: torch.Tensor,
    decay: float = 1.0,
) -> None:
    """``master = decay master + alpha z``, and the working weights from it.

    Args:
        kind: see :func:`make`.
        master: float32, contiguous, changed in place.
        working: working dtype, contiguous, overwritten.
        keys: see :func:`make`.
        which: see :func:`make`.
        alpha: float32 scalar on the device, ``-lr g``.
        decay: ``1 - lr weight_decay``.
    """
    n = master.numel()
    with torch.cuda.device(master.device):
        _step[_grid(n)](master, working, n, keys, which, alpha, decay, kind == "gaussian", BLOCK)
