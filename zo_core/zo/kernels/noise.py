"""Perturb, restore and update in one pass over the fp32 master, making z on the way.

The same z as :mod:`zo_core.zo.noise` - Rademacher bit for bit, Gaussian to float32 rounding - but
never stored: each kernel makes the values it needs from the counter, in registers. Keys and step
sizes are read from device memory, so that launching needs no value from the host. One launch does
all tensors of a dtype: where they lie is read from a table (:mod:`zo_core.zo.grouped`).
"""

# mypy: disable-error-code="no-untyped-def"
import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from zo_core.zo.grouped import BLOCK, COLUMNS, Group

WARPS = 2
"""Of a program: 16 values a thread, the fastest of 1, 2, 4 and 8 on an H100."""

_QUARTER = tl.constexpr(0.5 * math.pi)
_S3, _S5, _S7, _S9 = (tl.constexpr((-1) ** i / math.factorial(2 * i + 1)) for i in range(1, 5))
_C4, _C6, _C8 = (tl.constexpr((-1) ** i / math.factorial(2 * i)) for i in range(2, 5))
_FIRST, _SIZE, _KEY, _MASTER, _MASK, _OUT = (
    tl.constexpr(COLUMNS.index(name)) for name in ("first", "size", "key", "master", "mask", "out")
)
_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _normals(a, b):
    """Box-Muller. Cosine and sine by Taylor's series within an eighth of a turn, to 1e-7."""
    radius = tl.sqrt(-2.0 * libdevice.log((a.to(tl.float32) + 0.5) * 2.3283064365386963e-10))
    quarters = b.to(tl.float32) * 9.313225746154785e-10  # of a turn, 0 to 4: exact
    nearest = tl.floor(quarters + 0.5)
    angle = (quarters - nearest) * _QUARTER
    square = angle * angle
    sine = tl.fma(tl.fma(tl.fma(square, _S9, _S7), square, _S5), square, _S3)
    sine = tl.fma(sine * square, angle, angle)
    cosine = tl.fma(tl.fma(tl.fma(square, _C8, _C6), square, _C4), square, -0.5)
    cosine = tl.fma(cosine, square, 1.0)
    which = nearest.to(tl.int32)
    odd = (which & 1) == 1
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    x = tl.where(((which + 1) & 2) == 2, -x, x)
    y = tl.where((which & 2) == 2, -y, y)
    return radius * x, radius * y


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
def _row(table, owners, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """This program's row of the table, its block of that tensor, and the places in it."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(owners + program).to(tl.int64) * WIDTH
    block = program - tl.load(row + _FIRST)
    at = block * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(row + _SIZE)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return row, block, at, at < size


@triton.jit
def _at(row, column, at, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # noqa: N803
    """Pointers [BLOCK] into a tensor of the row."""
    pointers = tl.load(row + column).to(tl.pointer_type(DTYPE)) + at
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _masked_z(
    row,
    keys,
    block,
    at,
    MASKED: tl.constexpr,  # noqa: N803
    GAUSSIAN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """The tensor's z, 0 outside its mask if it has one."""
    z = _z(tl.load(keys + tl.load(row + _KEY)), block, GAUSSIAN, BLOCK)
    if MASKED:
        flags = tl.load(row + _MASK)
        covered = tl.load(row + _SIZE) * (flags != 0).to(tl.int64)
        flags = flags.to(tl.pointer_type(tl.uint8))
        tuned = tl.load(flags + at, mask=at < covered, other=1)
        z = z * tuned.to(tl.float32)
    return z


@triton.jit
def _point(
    table,
    owners,
    keys,
    scale,
    WIDTH: tl.constexpr,  # noqa: N803
    DTYPE: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    GAUSSIAN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row, block, at, inside = _row(table, owners, WIDTH, ALIGNED, BLOCK)
    z = _masked_z(row, keys, block, at, MASKED, GAUSSIAN, BLOCK)
    w = tl.load(_at(row, _MASTER, at, tl.float32, ALIGNED), mask=inside)
    tl.store(_at(row, _OUT, at, DTYPE, ALIGNED), tl.fma(z, scale, w).to(DTYPE), mask=inside)


@triton.jit
def _pair(
    table,
    owners,
    keys,
    eps,
    WIDTH: tl.constexpr,  # noqa: N803
    DTYPE: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    GAUSSIAN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row, block, at, inside = _row(table, owners, WIDTH, ALIGNED, BLOCK)
    z = _masked_z(row, keys, block, at, MASKED, GAUSSIAN, BLOCK)
    w = tl.load(_at(row, _MASTER, at, tl.float32, ALIGNED), mask=inside)
    tl.store(_at(row, _OUT, at, DTYPE, ALIGNED), tl.fma(z, eps, w).to(DTYPE), mask=inside)
    tl.store(_at(row, _OUT + 1, at, DTYPE, ALIGNED), tl.fma(z, -eps, w).to(DTYPE), mask=inside)


@triton.jit
def _step(
    table,
    owners,
    keys,
    alpha,
    WIDTH: tl.constexpr,  # noqa: N803
    DTYPE: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    GAUSSIAN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row, block, at, inside = _row(table, owners, WIDTH, ALIGNED, BLOCK)
    z = _masked_z(row, keys, block, at, MASKED, GAUSSIAN, BLOCK)
    master = _at(row, _MASTER, at, tl.float32, ALIGNED)
    w = tl.fma(z, tl.load(alpha), tl.load(master, mask=inside))
    tl.store(master, w, mask=inside)
    tl.store(_at(row, _OUT, at, DTYPE, ALIGNED), w.to(DTYPE), mask=inside)


@triton.jit
def _step_pair(
    table,
    owners,
    keys,
    next_keys,
    alpha,
    eps,
    WIDTH: tl.constexpr,  # noqa: N803
    DTYPE: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    GAUSSIAN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row, block, at, inside = _row(table, owners, WIDTH, ALIGNED, BLOCK)
    z = _masked_z(row, keys, block, at, MASKED, GAUSSIAN, BLOCK)
    master = _at(row, _MASTER, at, tl.float32, ALIGNED)
    w = tl.fma(z, tl.load(alpha), tl.load(master, mask=inside))
    tl.store(master, w, mask=inside)
    z = _masked_z(row, next_keys, block, at, MASKED, GAUSSIAN, BLOCK)
    tl.store(_at(row, _OUT, at, DTYPE, ALIGNED), tl.fma(z, eps, w).to(DTYPE), mask=inside)
    tl.store(_at(row, _OUT + 1, at, DTYPE, ALIGNED), tl.fma(z, -eps, w).to(DTYPE), mask=inside)


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


def perturb(kind: str, group: Group, keys: torch.Tensor, scale: float) -> None:
    """Write ``master + scale z`` of every tensor, rounded once; see :func:`perturb_pair`."""
    _launch(_point, kind, group, keys, scale)


def perturb_pair(kind: str, group: Group, keys: torch.Tensor, eps: float) -> None:
    """Write ``master + eps z`` and ``master - eps z`` of every tensor, each rounded once.

    Args:
        kind: see :func:`make`.
        group: the tensors; they have two outputs each, plus and minus.
        keys: int64 [P] on the device, Philox keys; the table says whose is which.
        eps: perturbation scale.
    """
    _launch(_pair, kind, group, keys, eps)


def step_pair(
    kind: str,
    group: Group,
    keys: torch.Tensor,
    next_keys: torch.Tensor,
    alpha: torch.Tensor,
    eps: float,
) -> None:
    """:func:`step` along one z and :func:`perturb_pair` along the next, reading the master once.

    The working weights themselves are left behind; :func:`step` with alpha 0 brings them up.
    """
    _launch(_step_pair, kind, group, keys, next_keys, alpha, eps)


def step(kind: str, group: Group, keys: torch.Tensor, alpha: torch.Tensor) -> None:
    """``master += alpha z`` of every tensor, and the working weights, its output, from it.

    Args:
        kind: see :func:`make`.
        group: the tensors.
        keys: see :func:`perturb_pair`.
        alpha: float32 scalar on the device, ``-lr g``.
    """
    _launch(_step, kind, group, keys, alpha)


def _launch(kernel, kind: str, group: Group, *arguments: object) -> None:
    with torch.cuda.device(group.table.device):
        kernel[(len(group.owners),)](
            group.table,
            group.owners,
            *arguments,
            WIDTH=group.table.shape[1],
            DTYPE=_DTYPES[group.dtype],
            ALIGNED=group.aligned,
            MASKED=group.masked,
            GAUSSIAN=kind == "gaussian",
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
