"""Tables of where a scope's tensors lie, for kernels that go through all of them in one launch.

A full-model scope has hundreds of tensors, and each launch costs the host some 25 microseconds. A
program of a grouped kernel reads from ``owners`` which tensor its block of values belongs to, and
from that tensor's row of the table where to read and write. Neither order nor grouping changes a
value: z depends on the tensor's own key and on the place in it alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from zo_core.zo.scope import TunedScope

BLOCK = 1024
"""Values a program makes: 256 counters of Gaussian noise, 8 of Rademacher."""

COLUMNS = ("first", "size", "key", "master", "mask", "out")
"""Of a table's row: the tensor's first program; its values; the index of its key; addresses of its
float32 master, of its mask of bytes (0: none), and of each output, one after the other."""

ALIGNMENT = 16
"""Bytes and values: where all addresses and sizes of a group are multiples of it, its kernel reads
and writes several values at once."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one dtype, P in number, and their B blocks."""

    dtype: torch.dtype
    table: torch.Tensor
    """int64 [P, 5 + outputs], see :data:`COLUMNS`."""
    owners: torch.Tensor
    """int32 [B]: the row of each program's tensor."""
    masked: bool
    """Whether any tensor has a mask."""
    aligned: bool
    """See :data:`ALIGNMENT`."""


class Groups:
    """The groups of a scope, by where its outputs lie; tables are made once and kept."""

    def __init__(self, scope: TunedScope) -> None:
        """Take a scope whose masters, masks and parameters stay where they are."""
        # Not the scope itself: whoever looks these up by scope must not keep it alive.
        self._parameters, self._master, self._masks = scope.parameters, scope.master, scope.masks
        self._members: dict[tuple[torch.dtype, bool], list[str]] = {}
        for name, parameter in scope.parameters.items():
            even = parameter.numel() % ALIGNMENT == 0
            self._members.setdefault((parameter.dtype, even), []).append(name)
        self._owners = {kind: self._owners_of(names) for kind, names in self._members.items()}
        self._made: dict[tuple[int, ...], list[Group]] = {}

    def writing_to(self, out: Mapping[str, Sequence[torch.Tensor]]) -> list[Group]:
        """The groups whose kernels write to these tensors.

        Args:
            out: parameter name -> tensors of the parameter's dtype and size, as many for each.
        """
        where = tuple(t.data_ptr() for name in self._parameters for t in out[name])
        if where not in self._made:
            self._made[where] = [
                self._group(dtype, even, names, out)
                for (dtype, even), names in self._members.items()
            ]
        return self._made[where]

    def _blocks(self, names: Sequence[str]) -> list[int]:
        return [-(-self._parameters[name].numel() // BLOCK) for name in names]

    def _owners_of(self, names: Sequence[str]) -> torch.Tensor:
        rows = torch.arange(len(names), dtype=torch.int32)
        owners = rows.repeat_interleave(torch.tensor(self._blocks(names)))
        return owners.to(self._parameters[names[0]].device)

    def _group(
        self,
        dtype: torch.dtype,
        even: bool,
        names: Sequence[str],
        out: Mapping[str, Sequence[torch.Tensor]],
    ) -> Group:
        order = list(self._parameters)
        firsts = [0, *accumulate(self._blocks(names))]
        addresses = [[self._master[n].data_ptr(), *(t.data_ptr() for t in out[n])] for n in names]
        masks = [self._masks[n].data_ptr() if n in self._masks else 0 for n in names]
        rows = [
            [first, self._parameters[name].numel(), order.index(name), master, mask, *outs]
            for first, name, mask, (master, *outs) in zip(
                firsts, names, masks, addresses, strict=False
            )
        ]
        owners = self._owners[dtype, even]
        return Group(
            dtype=dtype,
            table=torch.tensor(rows, dtype=torch.int64).to(owners.device),
            owners=owners,
            masked=any(masks),
            aligned=even and not any(address % ALIGNMENT for row in addresses for address in row),
        )
