"""The split rule (MeZO's): which rows train, which are held out as dev, which are evaluated."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")

SPLITS = ("train", "validation")
"""Splits that a task's data has; dev rows are taken from the first."""


def permutation(count: int, seed: int) -> list[int]:
    """A permutation of ``range(count)``: numpy's legacy generator, as MeZO draws its rows."""
    return np.random.RandomState(seed).permutation(count).tolist()


def train_and_dev(
    rows: Sequence[Row], train: int | None, dev: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Permute, take train + dev rows, and hold the last ``dev`` of them out.

    Args:
        rows: of the training split; more than ``dev``.
        train: at most so many training rows; None: all that are not dev rows.
        dev: rows held out.
        seed: the data seed.
    """
    most = len(rows) if train is None else train + dev
    drawn = [rows[i] for i in permutation(len(rows), seed)[:most]]
    border = len(drawn) - dev
    return drawn[:border], drawn[border:]


def evaluated(rows: Sequence[Row], count: int | None) -> list[Row]:
    """At most ``count`` rows of the validation split, in their order: a draw with seed 0.

    The same rows whatever the data seed, so that runs compare. Not the first ones: neighbours share
    a passage in most tasks, and the first rows would be few passages.
    """
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(permutation(len(rows), 0)[:count])]
