"""What a scan says of weights: outliers of the down-projections, and shares of Wanda scores.

Wanda (Sun et al. 2023) scores a weight by its magnitude times the L2 norm of its input channel.
OWL (Yin et al. 2024, eq. 1-2) and OwLore (Li et al. 2024) weight a layer by the share of the scores
of all its linear layers that lie above ``m`` times their mean.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from zo_core.analysis.observe import BlockObserver, Projection
from zo_core.analysis.statistics import Statistics
from zo_core.models.parts import LINEAR

MULTIPLES = tuple(range(3, 14))
"""``m`` of OWL's range."""
WEIGHT_COLUMNS = ("median", "mean", "rms", "kurtosis", "q99", "q999")


def weight_rows(observer: BlockObserver) -> list[dict[str, Any]]:
    """One row a down-projection of a block that was scanned, as in docs/scan.md."""
    rows: list[dict[str, Any]] = []
    for projection in observer.projections:
        with _here(projection.module):
            for expert, weight in enumerate(_down_weights(projection)):
                first = projection.first_channel + expert * weight.shape[1]
                number = len(rows)
                place = {"layer": observer.layer, "expert": number, "first_channel": first}
                rows.append(place | _describe(weight))
    return rows


def wanda_shares(observer: BlockObserver) -> dict[int, float]:
    """``m`` -> share of a block's Wanda scores above ``m`` x their mean; empty if unknown."""
    total, count = 0.0, 0
    for weight, norm in _scored(observer):
        by_channel = weight.abs().sum(0, dtype=torch.float64)
        total += float((by_channel * norm).sum())
        count += weight.numel()
    if not count or not total or not math.isfinite(total):
        return {}
    mean = total / count
    above = dict.fromkeys(MULTIPLES, 0)
    for weight, norm in _scored(observer):
        scores = weight.abs().float() * (norm / mean).float()
        # Few scores are above the least multiple: only those are compared with the others.
        scores = scores[scores > MULTIPLES[0]]
        for m in MULTIPLES:
            above[m] += int((scores > m).sum())
    return {m: found / count for m, found in above.items()}


def _here(module: nn.Module) -> AbstractContextManager[None]:
    """Within, a module has its weights, wherever ``accelerate`` keeps them."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _matrix(linear: nn.Module) -> torch.Tensor:
    """Weight [outputs, inputs] of a linear layer; Conv1D stores its transpose."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T  # type: ignore[return-value,operator]


def _down_weights(projection: Projection) -> Iterator[torch.Tensor]:
    if projection.experts is None:
        yield _matrix(projection.module)
        return
    for weight in projection.module.down_proj:  # type: ignore[union-attr]
        yield weight.T if getattr(projection.module, "is_transposed", False) else weight


def _scored(observer: BlockObserver) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every linear weight [outputs, inputs] of a block with the norms float64 [inputs]."""
    for key, squares in observer.squares.items():
        module, name = key if isinstance(key, tuple) else (key, "")
        with _here(module):
            if isinstance(module, LINEAR):
                yield _matrix(module), squares.sqrt().to(module.weight.device)  # type: ignore[arg-type]
                continue
            weights = getattr(module, name)
            for expert, weight in enumerate(weights):
                turned = weight.T if getattr(module, "is_transposed", False) else weight
                yield turned, squares[expert].sqrt().to(weight.device)


def _describe(weight: torch.Tensor) -> dict[str, Any]:
    """Statistics of a weight [outputs, inputs], of its columns and of its rows."""
    outputs, inputs = weight.shape
    statistics = Statistics(inputs, weight.device)
    statistics.add(weight, 0)
    found = statistics.row()
    row: dict[str, Any] = {"outputs": outputs, "inputs": inputs}
    for rank, (output, column, value) in enumerate(statistics.places(), start=1):
        row |= {
            f"top{rank}": abs(value),
            f"top{rank}_value": value,
            f"top{rank}_row": output,
            f"top{rank}_column": column,
        }
    row |= {name: found[name] for name in WEIGHT_COLUMNS}
    square = weight.float().square()
    for name, sizes in (("column", square.mean(0).sqrt()), ("row", square.mean(1).sqrt())):
        top = sizes.topk(min(3, len(sizes)))
        places = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        for rank, (size, place) in enumerate(places, start=1):
            row |= {f"{name}_top{rank}": size, f"{name}_top{rank}_{name}": place}
        row |= {f"{name}_median": float(sizes.median()), f"{name}_mean": float(sizes.mean())}
    return row
