"""Which forward path a job takes, and why."""

from collections.abc import Collection, Sequence

import torch

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.models.load import LoadedModel
from zo_core.tasks.templates import Example
from zo_core.zo import fp8
from zo_core.zo.forward import CHUNK, FastForward
from zo_core.zo.reference import Forward, ReferenceForward
from zo_core.zo.rounding import distance, fp8_error
from zo_core.zo.scope import Draw, TunedScope

GRAPHS_FROM = 50
"""Steps from which a run on a GPU replays CUDA graphs."""

COMPILED_FROM = 1e12
"""Steps x parameters from which it compiles its frozen blocks, which takes some ten seconds."""

FP8_DRAWS = 8
"""Draws on which the gradients of an fp8 suffix are held against float32."""

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
    suffix: str = "model",
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
        suffix: ``model``, or ``fp8`` for the frozen layers above the tuned ones.

    Returns:
        The path, and the reason in words.

    Raises:
        UserError: an fp8 suffix is not possible here.
    """
    if path == "reference":
        return reference_forward(loaded), "asked for"
    eight = suffix == "fp8"
    if eight:
        check_fp8(loaded.device, loaded.dtype)
    cuda = loaded.device.type == "cuda"
    long_enough = steps * loaded.info.parameters >= COMPILED_FROM
    fast = FastForward(
        loaded,
        layer or 0,
        chunk=chunk,
        graphs=cuda and steps >= GRAPHS_FROM,
        compiled=cuda and loaded.dtype != torch.float32 and (eight or long_enough),
        tuned=tuned,
        fp8=eight,
    )
    if eight and not fast.fp8:
        raise UserError(
            "suffix: fp8 finds no linear layer above the tuned ones: leave suffix at model, or "
            "tune a lower layer."
        )
    reason = "no padding, logits only where scored"
    if layer:
        reason += f", layers below {layer} frozen and cached"
    reason += fast.extras
    if path == "fast" and not eight:
        return fast, reason
    try:
        objection = _objection(loaded, fast, examples)
    except torch.OutOfMemoryError:
        return (
            fast,
            f"{reason}; not compared with the reference path, which memory is too short for",
        )
    if objection and eight:
        raise UserError(f"suffix: fp8 needs the fast path, but {objection}.")
    return (reference_forward(loaded), objection) if objection else (fast, reason)


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an fp8 suffix where there can be none.

    Raises:
        UserError: the device or the dtype does not go with it.
    """
    if problem := fp8.why_not(device, dtype):
        raise UserError(f"suffix: fp8 {problem}: leave suffix at model.")


def fp8_reason(
    job: TuneJob,
    loaded: LoadedModel,
    forward: FastForward,
    scope: TunedScope,
    examples: Sequence[Example],
) -> str:
    """What an fp8 suffix does to the projected gradient of a job, in words.

    Raises:
        UserError: the scope's points do not run in pairs, or what is left of the gradient is mostly
            rounding. (An error of half its size adds a quarter to the variance of g, which is
            little beside what the random direction brings.)
    """
    draws = [Draw(job.noise, job.seed, step) for step in range(1, FP8_DRAWS + 1)]
    own = eight = 0.0
    short = False
    if forward.pairs(scope):
        try:
            own, eight = fp8_error(loaded, forward, scope, examples, draws, job.eps)
        except torch.OutOfMemoryError:
            short = True
    if not forward.pairs(scope):  # which the first pair may have shown
        raise UserError(
            f"suffix: fp8 is for pairs of points, and the points of {job.scope} run one by one on "
            "this model: leave suffix at model."
        )
    if short:
        return "its rounding was not held against float32, which memory is too short for"
    found = (
        f"its rounding takes the projected gradient {eight:.0%} of its size away from float32's, "
        f"{loaded.dtype_name} {own:.0%} (rms of {FP8_DRAWS} draws)"
    )
    if not eight < max(1.0, own):
        raise UserError(f"suffix: fp8 is too coarse for this model: {found}: leave it at model.")
    return found


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
    try:
        apart, bound = distance(loaded, fast, examples)
    except NotImplementedError as error:
        return str(error)
    except (LookupError, TypeError) as error:  # it hands on what skipped blocks have not made
        return f"the fast path cannot run this family ({type(error).__name__}: {error})"
    if apart <= bound:
        return None
    return (
        f"the fast path disagrees on this family (log-probabilities {apart:.2g} apart, rounding "
        f"explains {bound:.2g}): please report it"
    )
