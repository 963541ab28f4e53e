"""Which tuning jobs can have the layers above the tuned ones in another arithmetic."""

from typing import TYPE_CHECKING, Literal

from zo_core import scope_spec

if TYPE_CHECKING:
    from zo_core.jobs import TuneJob

Suffix = Literal["model", "fp8"]


def fp8_impossible(job: "TuneJob") -> str:
    """Why a job cannot have an fp8 suffix, as far as its fields tell; empty if it may.

    It is for the two points of one direction, side by side, with frozen layers above.
    """
    if job.dtype not in ("auto", "bfloat16") or job.precision == "fp32":
        return "it goes with dtype bfloat16"
    if job.device == "cpu":
        return "it needs an NVIDIA GPU"
    if job.reference_only or job.path == "reference":
        return job.reference_only or "the reference path runs points one by one"
    if job.estimator != "two-sided":
        return f"estimator {job.estimator} has no pairs of points"
    if job.directions > 1 or job.optimizer == "conservative":
        return "more than two points run together with directions above 1 and conservative"
    spec = scope_spec.parse(job.scope)
    if spec.form in {"full", "sparse", "all-but"} or (spec.form == "lora" and not spec.layers):
        return f"scope {job.scope} leaves no frozen layers above it"
    return ""
