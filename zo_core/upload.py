"""From the host to a device, in one copy that nobody waits for."""

from collections.abc import Sequence

import torch

ALIGNMENT = 8
"""Bytes; no tensor here has wider elements."""


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The same tensors on a device.

    A copy takes a GPU some 3 microseconds, however little it copies. So all go as one, from pinned
    memory, and what comes back are views of it.

    Args:
        tensors: of the host.
        device: where to.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sizes = [-(-t.numel() * t.itemsize // ALIGNMENT) * ALIGNMENT for t in tensors]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for part, tensor in zip(packed.split(sizes), tensors, strict=True):
        _as(tensor, part).copy_(tensor)
    arrived = packed.to(device, non_blocking=True)
    return [_as(t, part) for t, part in zip(tensors, arrived.split(sizes), strict=True)]


def _as(tensor: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """A place like a tensor at the start of some bytes."""
    return room[: tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
