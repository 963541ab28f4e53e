"""Counter-based perturbations: ``z[i] = f(seed, step, direction, parameter name, i)``.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a 64-bit
key and a 128-bit counter into four 32-bit words. The key is a hash of (seed, step, direction,
parameter name), the counter is the index within the parameter. So z does not depend on which other
parameters are tuned, on their order, on the device or on how many devices there are; any step can
be replayed alone.

* ``gaussian``: words (a, b) of counter i // 4 give two normals by Box-Muller,
  ``sqrt(-2 ln u) (cos, sin)(2 pi v)`` with ``u = (a + 1/2) 2**-32``, ``v = b 2**-32``, in float32:
  equal across devices to float32 rounding.
* ``rademacher``: bit ``i % 128`` of counter ``i // 128``: equal everywhere, bit for bit.
* ``sphere``: the gaussian z times one scalar, ``sqrt(d) / |z|`` over the d tuned entries of the
  whole scope, so that ``E[z z^T] = I``. The scalar depends on the scope: between scopes the shared
  entries of z agree up to that one factor (within about ``sqrt(1 / 2d)`` of 1).
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 19
"""Values a chunk: the integer passes stay in a CPU's cache."""


def key(seed: int, step: int, name: str, direction: int = 0) -> int:
    """64-bit Philox key of one parameter's perturbation at one step."""
    text = f"{seed}/{step}/{direction}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def philox(key: int, counters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 of counters ``(c, 0, 0, 0)``.

    Args:
        key: 64-bit key.
        counters: int64 [n], each below 2**32.

    Returns:
        Four int64 [n] tensors of 32-bit words.
    """
    k0, k1 = key & _MASK, key >> 32
    c0 = counters.clone()
    c1, c2, c3 = (torch.zeros_like(counters) for _ in range(3))
    p0, p1 = torch.empty_like(counters), torch.empty_like(counters)
    for _ in range(10):  # in place: six buffers that stay in a CPU's cache
        # int64 products wrap modulo 2**64, which keeps all 64 bits of a 32 x 32-bit product.
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1)
        # Factors have to be 32-bit words; of c1 and c3 only the low words are ever used.
        c0.bitwise_and_(_MASK)
        c2.bitwise_and_(_MASK)
        c1, p1 = p1, c1
        c3, p0 = p0, c3
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _gaussian(words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    pairs = []
    for a, b in (words[:2], words[2:]):
        radius = a.to(torch.float32).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = b.to(torch.float32).mul_(2.0 * math.pi * 2.0**-32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=1).flatten()


def _rademacher(words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    bits = torch.arange(32, device=words[0].device)
    stacked = torch.stack(words, dim=1)[..., None]
    return ((stacked >> bits) & 1).mul_(2).sub_(1).to(torch.float32).flatten()


_KINDS = {
    "gaussian": (_gaussian, 4),
    "rademacher": (_rademacher, 128),
    "sphere": (_gaussian, 4),
}
_FINE = 2.0**20
"""Squares are summed as integers of this fineness: exact, whatever the order and the threads."""


def sphere_factor(directions: Iterable[torch.Tensor], size: int) -> float:
    """What a gaussian z is multiplied with to lie on the sphere of radius ``sqrt(d)``.

    The sum of squares is taken in integers, so neither threads nor order change it.

    Args:
        directions: float32 z of every parameter of the scope, 0 at entries that are not tuned.
        size: d, the number of tuned entries.
    """
    total = 0
    for z in directions:
        flat = z.flatten()
        step = _CHUNK if z.device.type == "cpu" else _CHUNK << 6
        for start in range(0, len(flat), step):
            squares = flat[start : start + step].square().mul_(_FINE).round_()
            total += int(squares.sum(dtype=torch.int64))
    return math.sqrt(size * _FINE / total) if total else 1.0


def perturbation(
    kind: str,
    seed: int,
    step: int,
    name: str,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    direction: int = 0,
) -> torch.Tensor:
    """The perturbation ``z`` of one parameter.

    Args:
        kind: ``gaussian``, ``rademacher`` or ``sphere``: mean 0 and variance 1. For ``sphere``
            this is the direction, to be multiplied by :func:`sphere_factor` of the whole scope.
        seed: the run's seed.
        step: the step, counted from 1.
        name: the parameter's name in ``model.named_parameters()``.
        shape: the parameter's shape; z is laid out in row-major order.
        device: where z is made.
        direction: index of the direction within the step.

    Returns:
        float32 tensor of ``shape``.

    Raises:
        ValueError: unknown kind, or a parameter of 2**32 counters or more.
    """
    if kind not in _KINDS:
        raise ValueError(f"noise {kind!r} is unknown: choose one of {', '.join(_KINDS)}.")
    transform, width = _KINDS[kind]
    values = math.prod(shape)
    counters = -(-values // width)
    if counters > _MASK:
        raise ValueError(f"{name} has {values} values: more than one Philox stream holds.")
    stream = key(seed, step, name, direction)
    if torch.device(device).type == "cuda":
        from zo_core.zo.kernels.noise import make

        made = torch.empty(tuple(shape), dtype=torch.float32, device=device)
        there = torch.tensor([stream], dtype=torch.uint64).view(torch.int64).to(device)
        make("rademacher" if kind == "rademacher" else "gaussian", made, there, 0)
        return made
    chunk = _CHUNK // width
    out = torch.empty(counters * width, dtype=torch.float32, device=device)
    for start in range(0, counters, chunk):
        stop = min(start + chunk, counters)
        words = philox(stream, torch.arange(start, stop, device=device))
        out[start * width : stop * width] = transform(words)
    return out[:values].view(tuple(shape))
