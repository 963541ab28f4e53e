"""Which forward path a job takes, and why."""

import math
from collections.abc import Collection, Sequence

import torch

from zo_core.models.load import LoadedModel
from zo_core.tasks.scoring import task_loss
from zo_core.tasks.templates import Example
from zo_core.zo.forward import CHUNK, FastForward, Forward, ReferenceForward

GRAPHS_FROM = 50
"""Steps from which a run on a GPU replays CUDA graphs."""

COMPILED_FROM = 1e12
"""Steps x parameters from which it compiles its frozen blocks, which takes some ten seconds."""

TOLERANCE = {torch.float32: 1e-4}
ROUNDED_TOLERANCE = 5e-2
"""How far the losses of both paths may be apart, in nats: two bf16 forward passes that add in
another order differ by about the rounding of a logit, 2**-8 of some 10 nats."""


def choose_forward(
    loaded: LoadedModel,
    path: str,
    layer: int | None,
    examples: Sequence[Example],
    chunk: int = CHUNK,
    steps: int = 0,
    tuned: Collection[str] = (),
) -> tuple[Forward, str]:
    """The forward path of a job. ``auto`` takes the fast one if it agrees with the reference.

    Args:
        loaded: the model, with its base weights.
        path: ``auto``, ``fast`` or ``reference``.
        layer: the lowest tuned layer; None: nothing is frozen below.
        examples: a few examples to compare the paths on.
        chunk: see :class:`~zo_core.zo.forward.FastForward`.
        steps: how many steps will be run: what takes time to set up must be worth it.
        tuned: names of the tuned parameters.

    Returns:
        The path, and the reason in words.
    """
    if path == "reference":
        return ReferenceForward(loaded), "asked for"
    graphs = loaded.device.type == "cuda" and loaded.dtype != torch.float32
    fast = FastForward(
        loaded,
        layer or 0,
        chunk=chunk,
        graphs=graphs and steps >= GRAPHS_FROM,
        compiled=graphs and steps * loaded.info.parameters >= COMPILED_FROM,
        tuned=tuned,
    )
    reason = "no padding, logits only where scored"
    if layer:
        reason += f", layers below {layer} frozen and cached"
    reason += fast.extras
    if path == "fast":
        return fast, reason
    objection = _objection(loaded, fast, examples)
    return (ReferenceForward(loaded), objection) if objection else (fast, reason)


def _objection(loaded: LoadedModel, fast: FastForward, examples: Sequence[Example]) -> str | None:
    """Why the fast path is not taken; None if there is no reason."""
    if not getattr(loaded.model, "_supports_attention_backend", False):
        return f"the attention of {type(loaded.model).__name__} cannot be packed"
    losses = []
    for path in (fast, ReferenceForward(loaded)):
        try:
            prepared = path.prepare(examples)
            losses.append(float(task_loss(path.logits(prepared), prepared.scored)))
        except NotImplementedError as error:
            return str(error)
    tolerance = TOLERANCE.get(loaded.dtype, ROUNDED_TOLERANCE)
    if math.isclose(*losses, rel_tol=tolerance, abs_tol=tolerance):
        return None
    return (
        f"the fast path disagrees on this family ({losses[0]:.5f}, reference {losses[1]:.5f}): "
        "please report it"
    )
