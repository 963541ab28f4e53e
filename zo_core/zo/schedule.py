"""The learning rate of a step."""

import math

from zo_core.jobs import TuneJob


def learning_rate(job: TuneJob, step: int) -> float:
    """Learning rate of a step, counted from 1.

    Linear warm-up ``lr step / warmup_steps``; then, with t from 0 to 1 over the steps that are left
    (the last step still moves): ``constant`` lr, ``linear`` ``lr (1 - t)``, ``cosine``
    ``lr (1 + cos(pi t)) / 2``.
    """
    lr = job.effective_lr
    if step <= job.warmup_steps:
        return lr * step / job.warmup_steps
    t = (step - 1 - job.warmup_steps) / (job.steps - job.warmup_steps)
    if job.schedule == "linear":
        return lr * (1 - t)
    if job.schedule == "cosine":
        return lr * (1 + math.cos(math.pi * t)) / 2
    return lr
