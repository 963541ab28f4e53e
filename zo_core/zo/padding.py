"""The padded layout of a packing, for attention that does not take segments as they are."""

from dataclasses import dataclass
from typing import Protocol

import torch


class Padding(Protocol):
    """What attention without flash needs to know of a packing."""

    @property
    def padded_queries(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def padded_keys(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def unpad(self) -> torch.Tensor: ...  # noqa: D102
    def visible(self, window: int) -> torch.Tensor | None: ...  # noqa: D102


def places_of(
    lengths: torch.Tensor, longest_query: int, longest_key: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of padded queries [S, Lq, 1] and keys [S, 1, Lk] in their sequences; -1: padding.

    Args:
        lengths: int64 [2, S], queries and keys of each segment.
        longest_query: Lq.
        longest_key: Lk.
    """
    first = lengths[1] - lengths[0]
    queries = first[:, None] + torch.arange(longest_query, device=lengths.device)
    keys = torch.arange(longest_key, device=lengths.device).expand(len(first), -1)
    return queries[:, :, None], keys.masked_fill(keys >= lengths[1, :, None], -1)[:, None]


def seen_keys(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """Which keys, bool [S, 1, Lq, Lk], a query sees, by :func:`places_of`; 0: no window."""
    seen = (keys <= queries) & (keys >= 0)
    if window:
        seen &= keys > queries - window
    return seen[:, None]


@dataclass(slots=True)
class PaddedIndex:
    """The padded layout of a packing in tensors that stay where they are."""

    lengths: torch.Tensor
    """int64 [2, S]: queries and keys of each segment."""
    padded_queries: torch.Tensor
    """See :class:`~zo_core.zo.packing.Packing`."""
    padded_keys: torch.Tensor
    """See :class:`~zo_core.zo.packing.Packing`."""
    unpad: torch.Tensor
    """See :class:`~zo_core.zo.packing.Packing`."""
    shared: bool

    def visible(self, window: int) -> torch.Tensor | None:
        """See :meth:`~zo_core.zo.packing.Packing.visible`."""
        if not self.shared and not window:
            return None
        longest = self.padded_queries.shape[1], self.padded_keys.shape[1]
        return seen_keys(*places_of(self.lengths, *longest), window)
