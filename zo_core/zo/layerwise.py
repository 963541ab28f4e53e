"""One batch, any layer: run once with the base weights, then again from the perturbed layer on.

The first pass keeps every block's output. It is the frozen prefix of every layer above, so no layer
is run twice with the same weights, and it is what a perturbed block's output is compared with.

The **relative change** of block j's output when layer k is perturbed is the mean over the tokens t
of the batch of ``|h_j,t(theta') - h_j,t(theta)| / |h_j,t(theta)|``, with Euclidean norms over
channels. It is a mean of ratios, not a ratio of norms over the whole output: a massive activation
is nearly all of the norm of its layer's output, and one token would hide all others.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from zo_core.models.decoder import hidden_of
from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import task_loss
from zo_core.tasks.templates import Example
from zo_core.zo.forward import FastForward
from zo_core.zo.packing import common_start, shared_start
from zo_core.zo.reference import Forward, Prepared, ReferenceForward
from zo_core.zo.scope import Point, TunedScope


@dataclass(frozen=True, slots=True)
class Response:
    """What a batch says of the weights at one point."""

    loss: float
    """Nats."""
    kl: float
    """Mean over scored places of KL(p(theta) || p(theta')) of the next token, in nats."""
    changes: list[float]
    """Relative change of the output of the perturbed layer and of every block above it."""


class LayerwiseBatch:
    """A batch that can be run from any layer on. Holds the base output of every block."""

    @torch.no_grad()
    def __init__(
        self, loaded: LoadedModel, examples: Sequence[Example], forward: Forward | None = None
    ) -> None:
        """Run the batch once with the weights as they are.

        Args:
            loaded: the model, with its base weights.
            examples: the batch.
            forward: which path; None: a fast one of its own. Batches may share one: each moves it
                to the layer it asks for.
        """
        self._loaded = loaded
        self._forward = forward or FastForward(loaded)
        self.prepared: Prepared = self._forward.prepare(examples)
        self._place: tuple[torch.Tensor, torch.Tensor] | None = None
        if isinstance(self._forward, ReferenceForward):
            self._place = _places(examples, self.prepared, loaded.device)
        outputs: list[torch.Tensor] = []
        """Of every block, as it lies in memory: [1, T, H] packed, [R, T, H] padded."""

        def keep(_module: nn.Module, _args: Any, output: object) -> None:
            outputs.append(hidden_of(output).clone())

        with ExitStack() as hooks:
            for block in loaded.decoder.blocks:
                hooks.callback(block.register_forward_hook(keep).remove)
            if isinstance(self._forward, FastForward):
                logits = self._forward.trace(self.prepared)
            else:
                logits = self._forward.logits(self.prepared)
        self._inputs = outputs
        self._base = [self._tokens(h, 1)[0] for h in outputs]
        self._share = self._shares(examples, len(self._base[0]))
        self._norms = [h.float().norm(dim=-1).clamp(min=torch.finfo().tiny) for h in self._base]
        self._log_probability = logits.float().log_softmax(-1)
        self.loss = float(task_loss(logits, self.prepared.scored))
        """Of the base weights, in nats."""

    def respond(self, layer: int, scope: TunedScope, points: Sequence[Point]) -> list[Response]:
        """Loss, KL and relative changes at points of a layer's weights.

        Leaves the working weights in an unspecified state: restore or close the scope next.

        Args:
            layer: 0-based.
            scope: of that layer's parameters.
            points: n points, run side by side where the path can.
        """
        changes: list[list[torch.Tensor]] = [[] for _ in points]
        with ExitStack() as hooks:
            self._watch(hooks, layer, changes, len(self._loaded.decoder))
            found = self._at(layer, scope, points)
        moved = torch.stack([torch.stack(c) for c in changes]).tolist()
        return [
            Response(float(task_loss(logits, self.prepared.scored)), self._kl(logits), change)
            for logits, change in zip(found, moved, strict=True)
        ]

    def own_change(self, layer: int, scope: TunedScope, points: Sequence[Point]) -> float:
        """Relative change of the perturbed layer's own output, mean over points.

        The blocks above are not run. Leaves the working weights in an unspecified state.
        """
        changes: list[list[torch.Tensor]] = [[] for _ in points]
        with ExitStack() as hooks, suppress(_Enough):
            self._watch(hooks, layer, changes, layer + 1, stop=True)
            self._at(layer, scope, points)
        return float(torch.stack([own[0] for own in changes]).mean())

    def _at(self, layer: int, scope: TunedScope, points: Sequence[Point]) -> torch.Tensor:
        prepared = self.prepared
        if isinstance(self._forward, FastForward):
            self._forward.begin_at(layer)
            prepared = replace(prepared, hidden=self._inputs[layer - 1] if layer else None)
        return self._forward.logits_at(prepared, scope, points)

    def _watch(
        self,
        hooks: ExitStack,
        layer: int,
        changes: list[list[torch.Tensor]],
        end: int,
        stop: bool = False,
    ) -> None:
        """Have the blocks from ``layer`` to before ``end`` note their relative change.

        Args:
            hooks: what removes them.
            layer: the perturbed one.
            changes: a list for each point, filled in the order of blocks.
            end: see above.
            stop: whether the pass ends once every point has been noted.
        """

        def note(block: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: object) -> None:
                hidden = hidden_of(output)
                # All points side by side in one pass, or the next point of a pass for each.
                copies = hidden.numel() // self._inputs[block].numel()
                for states in self._tokens(hidden, copies):
                    moved = (states.float() - self._base[block].float()).norm(dim=-1)
                    waiting = next(c for c in changes if len(c) == block - layer)
                    waiting.append((moved / self._norms[block]) @ self._share)
                if stop and changes[-1]:
                    raise _Enough

            return hook

        for number in range(layer, end):
            handle = self._loaded.decoder.blocks[number].register_forward_hook(note(number))
            hooks.callback(handle.remove)

    def _tokens(self, hidden: torch.Tensor, copies: int) -> list[torch.Tensor]:
        """States [T, H] of the batch's tokens, for each copy of a packed row."""
        if self._place is not None:
            return [hidden[self._place]]
        return list(hidden[0].chunk(copies))

    def _shares(self, examples: Sequence[Example], tokens: int) -> torch.Tensor:
        """Float32 [T]: what each token counts in a mean over the tokens of all examples.

        A packed row holds the start that all examples share once, and first.
        """
        shares = torch.ones(tokens, device=self._loaded.device)
        if self._place is None:
            shares[: shared_start([e.rows for e in examples])] = len(examples)
        return shares / shares.sum()

    def _kl(self, logits: torch.Tensor) -> float:
        base = self._log_probability
        return float((base.exp() * (base - logits.float().log_softmax(-1))).sum(-1).mean())


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """The rest of a forward pass is not wanted."""


def _places(
    examples: Sequence[Example], prepared: Prepared, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column, in the padded layout, of each token of each example, a shared prompt's once.

    So the relative changes of both paths are means over the same tokens.
    """
    assert prepared.mask is not None
    rows, columns, first = [], [], 0
    pads = (1 - prepared.mask).sum(-1).tolist()
    for example in examples:
        starts = [c.tokens[:-1] for c in example.candidates]
        for number, row in enumerate(example.rows):
            at = first + starts.index(row)
            common = common_start(example.rows[0], row) if number else 0
            rows += [at] * (len(row) - common)
            columns += [pads[at] + i for i in range(common, len(row))]
        first += len(starts)
    both = torch.tensor([rows, columns], device=device)
    return both[0], both[1]
