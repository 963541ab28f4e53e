"""Forward passes: the one budget that every arm of a comparison gets.

Counted as the trainer counts them (``forward_passes`` in the ledger), with AdamW's backward pass
in the same unit.
"""

from zo_core.jobs import TuneJob

ADAMW_PASSES = 4
"""One forward pass, the blocks run once more in the backward pass (gradient checkpointing), and
the backward pass itself, which is counted as two forward passes (the usual 2:1 rule of
floating-point operations). The ledger of an adamw run counts its one plain forward pass only."""


def passes_per_step(job: TuneJob) -> int:
    """Forward passes that one optimizer step costs.

    Two-sided: 2 q. One-sided: q + 1. Conservative: also L(theta), unless one-sided has it already,
    and L after the step. AdamW: :data:`ADAMW_PASSES`. All times ``accumulate`` micro-batches.
    """
    q = job.directions
    if job.optimizer == "adamw":
        passes = ADAMW_PASSES
    elif job.estimator == "one-sided":
        passes = q + 1 + (job.optimizer == "conservative")
    else:
        passes = 2 * q + 2 * (job.optimizer == "conservative")
    return passes * job.accumulate
