"""Out of memory: what a run gives up, one rung at a time, until its step fits again.

First what costs time only and changes no bit: the prefix cache is emptied, then it lives in host
memory, then there are no CUDA graphs (:meth:`~zo_core.zo.reference.Forward.give_up`). Then the
batch is split: half as many examples a forward pass, down to one. The loss stays the mean over rows
of the whole batch, so loss and projected gradient are the same to rounding. Each rung frees memory
for good; a run never climbs back up.

The steps and the evaluations of a run have a ladder each. What costs time only is of the path that
both use, and is given up once, whoever runs short. Batches are their own: an evaluation that is
split leaves every bit of the training as it was, and a step that is split leaves the evaluations.
"""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from zo_core.errors import MemoryExhaustedError
from zo_core.tasks.templates import Example
from zo_core.zo.reference import Forward

T = TypeVar("T")


class MemoryLadder:
    """Where the steps, or the evaluations, of a run stand, and the way down."""

    def __init__(
        self,
        forward: Forward,
        rows: Sequence[Sequence[Example]],
        batch_size: int,
        said: Callable[[str, int], None],
        micro_batch: int | None = None,
    ) -> None:
        """Stand on the highest rung, or where the run stood before it was interrupted.

        Args:
            forward: the path that runs; it is told.
            rows: the data sets that are run.
            batch_size: examples that a forward pass holds if memory allows.
            said: told of every rung in one sentence, with the micro-batch from then on.
            micro_batch: examples that fitted before.
        """
        self._forward, self._rows, self._said = forward, rows, said
        self.micro_batch = batch_size if micro_batch is None else min(micro_batch, batch_size)
        """Most examples that a forward pass may hold."""
        self._limit()

    def _limit(self) -> None:
        for rows in self._rows:
            self._forward.limit(self.micro_batch, rows)

    def hold(
        self,
        attempt: Callable[[], T],
        where: Callable[[], str],
        recover: Callable[[], None] = lambda: None,
    ) -> T:
        """Do something until the device has the memory for it.

        Args:
            attempt: what to do; it may be left at any point and is begun again.
            where: of the run it failed, for the message, as "at step 12".
            recover: undoes what a failed attempt left half done; may itself run out of memory.

        Raises:
            MemoryExhaustedError: it does not fit on the lowest rung either.
        """
        failed = False
        while True:
            try:
                if failed:
                    recover()
                return attempt()
            except torch.OutOfMemoryError:
                failed = True
            # Out here the error is gone, and with it the frames that hold the attempt's tensors.
            self._step_down(where())

    def _step_down(self, where: str) -> None:
        gc.collect()
        if (given_up := self._forward.give_up()) is None:
            if self.micro_batch == 1:
                raise MemoryExhaustedError(
                    f"Out of memory {where} even with one example a forward pass: shorten "
                    "the texts, tune a smaller scope, try dtype bfloat16, or unload other models. "
                    "The steps before it are kept."
                )
            self.micro_batch = -(-self.micro_batch // 2)
            self._limit()
            given_up = f"batch split into micro-batches of {self.micro_batch}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._said(f"out of memory {where}: {given_up}", self.micro_batch)
