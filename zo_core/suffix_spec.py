"""Which tuning jobs can have the layers above the tuned ones in another arithmetic."""

from typing import TYPE_CHECKING, Literal

from zo_core import scope_spec

if TYPE_CHECKING:
    from zo_core.jobs import TuneJob

Suffix = Literal["model", "fp8"]


def no_pairs(job: "TuneJob") -> str:
    """Why a job does not run the two points of a direction side by side; empty if it may."""
    if job.reference_only or job.path == "reference":
        return job.reference_only or "the reference path runs them one by one"
    if job.estimator != "two-sided":
        return f"estimator {job.estimator} has none"
    if job.directions > 1 or job.optimizer == "conservative":
        return "more than two points run together with directions above 1 and conservative"
    if scope_spec.parse(job.scope).form in {"full", "sparse", "all-but"}:
        return f"scope {job.scope} leaves no frozen layers above it"
    return ""
