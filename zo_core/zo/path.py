"""Which forward path a job takes, and why."""

import math
from collections.abc import Collection, Sequence

import torch

from zo_core.errors import UserError
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

PADDING = 0.2
"""Relative change of a row's logits from which padding counts: rounding gives 1e-7 in float32 and
about 1e-2 in bfloat16, families that look at padding 0.8 and more."""


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
        return reference_forward(loaded), "asked for"
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
    return (reference_forward(loaded), objection) if objection else (fast, reason)


@torch.no_grad()
def reference_forward(loaded: LoadedModel) -> ReferenceForward:
    """The reference path, for a model that leaves left padding out of account.

    Recurrent models such as RWKV run their state through it, and some decoders, such as BART's,
    count its positions: their numbers would depend on the other rows of a batch.

    Raises:
        UserError: the logits of a padded row are not those of the same row alone.
    """
    row, pads = [9, 17, 23, 31, 45], 3
    device = loaded.device
    mask = torch.tensor([[0] * pads + [1] * len(row)], device=device)
    alone = loaded.model(input_ids=torch.tensor([row], device=device), use_cache=False)
    padded = loaded.model(
        input_ids=torch.tensor([[0] * pads + row], device=device),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    )
    one, other = alone.logits[0, -1].float(), padded.logits[0, -1].float()
    if bool((one - other).norm() > PADDING * (one - one.mean()).norm()):
        raise UserError(
            f"model: {loaded.name} does not leave left padding out of account (recurrent?), "
            "so the rows of a batch would change each other's loss: it can be scanned, but not "
            "probed or tuned."
        )
    return ReferenceForward(loaded)


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
