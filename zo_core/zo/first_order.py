"""AdamW, the first-order baseline: true gradients through the reference path.

``m = beta1 m + (1 - beta1) d``, ``v = beta2 v + (1 - beta2) d^2``,
``u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + 1e-8)``, decoupled weight decay
(Loshchilov and Hutter 2019, Algorithm 2; the rule of ``torch.optim.AdamW``), on the scope's fp32
master. There is no ledger of scalars: a run resumes from its checkpoint, which holds the moments.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import task_loss
from zo_core.zo.optimizers import TINY, WithMoments
from zo_core.zo.reference import Forward, Prepared
from zo_core.zo.scope import Terms, TunedScope


class AdamW(WithMoments):
    """AdamW on a scope."""

    def step(
        self,
        scope: TunedScope,
        gradients: dict[str, torch.Tensor],
        step: int,
        lr: float,
        count: bool = False,
    ) -> int | None:
        """Step the scope against float32 gradients; returns what ``scope.update`` does."""
        job = self._job

        def terms(name: str) -> Terms:
            gradient = gradients[name]
            m = self._moment("m", name, gradient).lerp_(gradient, 1 - job.beta1)
            v = self._moment("v", name, gradient).mul_(job.beta2)
            v.addcmul_(gradient, gradient, value=1 - job.beta2)
            scale = v.sqrt().div_((1 - job.beta2**step) ** 0.5).add_(TINY)
            return [(1 / (1 - job.beta1**step), m / scale)]

        return scope.update(terms, lr, job.weight_decay, count)


def gradients_of(
    loaded: LoadedModel,
    forward: Forward,
    batch: Sequence[Prepared],
    scope: TunedScope,
    rows: int,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and its gradient at the working weights, blocks recomputed in the backward pass.

    Args:
        loaded: the model.
        forward: the reference path.
        batch: the micro-batches; the loss is the mean over all their rows.
        scope: what is tuned.
        rows: how many examples they hold together.

    Returns:
        (loss in nats, name -> float32 gradient, 0 outside masks).
    """
    total = 0.0
    with _tracked(scope), recomputed(loaded.decoder.blocks), torch.enable_grad():
        for prepared in batch:
            loss = task_loss(forward.logits(prepared), prepared.scored)
            loss = loss * (len(prepared.scored.label) / rows)
            loss.backward()
            total += float(loss.detach())
        found = {}
        for name, parameter in scope.parameters.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grad = grad.to(torch.float32)
            found[name] = grad * scope.masks[name] if name in scope.masks else grad
    return total, found


@contextmanager
def _tracked(scope: TunedScope) -> Iterator[None]:
    """Within, the scope's working weights require gradients."""
    for parameter in scope.parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in scope.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within, blocks keep only their inputs and are run again in the backward pass.

    Not Hugging Face's switch: that one works in training mode alone, which turns dropout on.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # uncovers the class's own
