"""Hooks on one decoder block that feed the statistics of its parts, see docs/scan.md.

The attention's output and the MLP's are taken from the last linear layer that runs inside them and
writes as many channels as the block has: what comes after it (dropout, the residual that some
families add inside, a norm of Gemma) is no longer theirs. The MLP's last layer is the
down-projection and its input the down-projection input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zo_core.analysis.statistics import Statistics
from zo_core.models.decoder import hidden_of
from zo_core.models.parts import BlockParts, Experts, find_parts

PARTS = ("block_output", "attention_output", "mlp_output", "down_input")


@dataclass(frozen=True, slots=True)
class Batch:
    """Which rows of a padded batch [B, T] are real tokens; tokens of a scan count through."""

    size: int
    """B * T."""
    first: int
    """Number of the first real token."""
    tokens: torch.Tensor
    """int64 [N]: numbers of the real tokens, consecutive."""
    rows: torch.Tensor | None
    """int64 [N]: its row in the flattened batch; None if every row is real."""
    kept: int
    """So many real tokens come first that belong to the token table."""

    def real(self, states: torch.Tensor) -> torch.Tensor:
        """The rows of real tokens [N, C] of states [..., C]."""
        flat = states.reshape(-1, states.shape[-1])
        return flat if self.rows is None else flat.index_select(0, self.rows.to(flat.device))

    def numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 [S]: token at each of some rows of the flattened batch; -1: padding."""
        if self.rows is None:
            return self.tokens.to(rows.device)[rows]
        numbers = torch.full((self.size,), -1, dtype=torch.int64, device=self.tokens.device)
        numbers[self.rows] = self.tokens
        return numbers.to(rows.device)[rows]


@dataclass(slots=True)
class Projection:
    """A down-projection that was seen to run."""

    module: nn.Module
    experts: Experts | None
    """All of them, if the module holds several."""
    first_channel: int


class BlockObserver:
    """Statistics of the parts of one block."""

    def __init__(self, block: nn.Module, layer: int, device: torch.device, parts: bool) -> None:
        """Prepare.

        Args:
            block: the decoder block; its weights need not be there yet.
            layer: 0-based.
            device: of its outputs.
            parts: also look inside the block.
        """
        self.layer = layer
        self.statistics: dict[str, Statistics] = {}
        self.squares: dict[nn.Module | tuple[nn.Module, str], torch.Tensor] = {}
        """Linear layer, or (experts, their weight) -> float64 sums of squares by input channel."""
        self.projections: list[Projection] = []
        self.kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """For the token table: (token, largest magnitude, its channel), tensors of one length."""
        self.batch: Batch | None = None
        self._block, self._device = block, device
        self._parts: BlockParts | None = find_parts(block) if parts else None
        self._handles: list[Any] = []
        self._width = 0
        self._forget()

    def _forget(self) -> None:
        self._mixed: torch.Tensor | None = None
        self._down: tuple[nn.Module, torch.Tensor, torch.Tensor] | None = None
        self._routed: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def attach(self) -> None:
        """Put the hooks on; :attr:`batch` is to be set before every forward pass."""
        add = self._handles.append
        add(self._block.register_forward_pre_hook(self._enter, with_kwargs=True))
        parts = self._parts
        if parts is not None:
            for linear in parts.linears:
                add(linear.register_forward_hook(self._linear))
            if parts.mixer is not None:
                add(parts.mixer.register_forward_hook(self._mixer))
            if parts.experts is not None and parts.readable:
                add(parts.experts.module.register_forward_pre_hook(self._route, with_kwargs=True))
            if parts.mlp is not None:
                add(parts.mlp.register_forward_hook(self._mlp))
        add(self._block.register_forward_hook(self._leave))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()
        if self._parts is not None and self._parts.experts is not None:
            self._parts.experts.module.__dict__.pop("_apply_gate", None)

    def add(self, part: str, states: torch.Tensor) -> None:
        """Take in states [..., C] of every row of the batch as one part."""
        assert self.batch is not None
        real = self.batch.real(states)
        statistics = self._statistics(part, real.shape[-1])
        real = real.to(self._device)
        statistics.add(real, self.batch.first)
        if part == "block_output" and self.batch.kept and self.layer >= 0:
            n = self.batch.kept
            largest = real[:n].abs().float().nan_to_num(0.0, 0.0, 0.0).max(-1)
            self.kept.append((self.batch.tokens[:n], largest.values, largest.indices))

    def _statistics(self, part: str, channels: int, routed: bool = False) -> Statistics:
        if part not in self.statistics:
            # Experts x neurons would be channels by the hundred thousand.
            by_channel = self.layer >= 0 and not routed
            self.statistics[part] = Statistics(channels, self._device, by_channel)
        return self.statistics[part]

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._width = hidden.shape[-1]

    def _leave(self, _module: nn.Module, _args: Any, output: object) -> None:
        if self._parts is not None and self._parts.mlp is None:
            self._read_mlp(None)
        self.add("block_output", hidden_of(output))
        self._forget()

    def _mixer(self, _module: nn.Module, _args: Any, output: object) -> None:
        states = self._mixed
        if states is None:
            states = output[0] if isinstance(output, tuple | list) else output  # type: ignore[assignment]
        self._mixed = None
        if isinstance(states, torch.Tensor) and self._whole(states):
            self.add("attention_output", states)

    def _mlp(self, _module: nn.Module, _args: Any, output: object) -> None:
        self._read_mlp(output)

    def _linear(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        assert self._parts is not None
        assert self.batch is not None
        states = args[0]
        if not self._whole(states) or not isinstance(output, torch.Tensor):
            return
        if self._seen is None or self._seen[0] is not states:
            self._seen = (states, squares_by_channel(self.batch.real(states)))
        self._add_squares(module, self._seen[1])
        if output.shape[-1] != self._width:
            return
        if module in self._parts.mixer_linears:
            self._mixed = output
        elif module in self._parts.mlp_linears:
            self._down = (module, states, output)

    def _whole(self, states: torch.Tensor) -> bool:
        """Whether a tensor has one row for every row of the batch."""
        assert self.batch is not None
        return states.numel() == self.batch.size * states.shape[-1]

    def _add_squares(self, key: nn.Module | tuple[nn.Module, str], found: torch.Tensor) -> None:
        known = self.squares.get(key)
        self.squares[key] = found if known is None else known + found

    def _route(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which token goes to which expert, and watch the experts' gate."""
        hidden, index = [*args, *kwargs.values()][:2]
        if module.config._experts_implementation != "grouped_mm":  # type: ignore[union-attr]
            return
        # As transformers sorts them: rows of one expert stand together.
        expert, order = torch.sort(index.reshape(-1))
        row = order // index.shape[-1]
        module.__dict__.pop("_apply_gate", None)
        gate: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate  # type: ignore[assignment]

        def watched(states: torch.Tensor) -> torch.Tensor:
            gated = gate(states)
            self._routed.append((gated, expert, row))
            self._expert_squares(module, hidden, gated, expert, row)
            return gated

        module.__dict__["_apply_gate"] = watched

    def _expert_squares(
        self,
        module: nn.Module,
        hidden: torch.Tensor,
        gated: torch.Tensor,
        expert: torch.Tensor,
        row: torch.Tensor,
    ) -> None:
        assert self._parts is not None
        assert self._parts.experts is not None
        assert self.batch is not None
        real = (self.batch.numbers(row) >= 0).double()[:, None]
        for name, states in (("gate_up_proj", hidden[row]), ("down_proj", gated)):
            found = torch.zeros(
                self._parts.experts.count,
                states.shape[-1],
                dtype=torch.float64,
                device=states.device,
            )
            found.index_add_(0, expert, states.double().square() * real)
            self._add_squares((module, name), found)

    def _read_mlp(self, output: object) -> None:
        """The MLP, or the loose layers that stand for it, has run."""
        assert self._parts is not None
        parts, down = self._parts, self._down
        self._down = None
        if parts.experts is None and down is not None and parts.readable:
            module, states, written = down
            self.add("mlp_output", written)
            self._project(module, None, 0)
            self.add("down_input", states)
            return
        mixed = output[0] if isinstance(output, tuple | list) else output
        if isinstance(mixed, torch.Tensor) and self._whole(mixed):
            self.add("mlp_output", mixed)
        if parts.experts is not None and parts.readable and self._routed:
            self._add_routed(parts.experts, down)
        self._routed = []

    def _add_routed(
        self, experts: Experts, shared: tuple[nn.Module, torch.Tensor, torch.Tensor] | None
    ) -> None:
        assert self.batch is not None
        first_shared = experts.count * experts.width
        width = first_shared + (shared[1].shape[-1] if shared is not None else 0)
        statistics = self._statistics("down_input", width, routed=True)
        self._project(experts.module, experts, 0)
        for states, expert, row in self._routed:
            tokens = self.batch.numbers(row)
            if self.batch.rows is not None:
                real = tokens >= 0
                states, tokens, expert = states[real], tokens[real], expert[real]
            statistics.add(
                states.to(self._device),
                tokens.to(self._device),
                (expert * experts.width).to(self._device),
            )
        if shared is not None:
            self._project(shared[0], None, first_shared)
            real_rows = self.batch.real(shared[1]).to(self._device)
            statistics.add(
                real_rows, self.batch.tokens, torch.full_like(self.batch.tokens, first_shared)
            )

    def _project(self, module: nn.Module, experts: Experts | None, first_channel: int) -> None:
        if all(p.module is not module for p in self.projections):
            self.projections.append(Projection(module, experts, first_channel))


def squares_by_channel(states: torch.Tensor) -> torch.Tensor:
    """float64 [C]: sum of the squares of states [N, C], each piece of rows in float32."""
    if states.is_cuda:
        return torch.linalg.vector_norm(states, dim=0, dtype=torch.float32).double().square()
    return states.float().square().sum(0, dtype=torch.float64)
