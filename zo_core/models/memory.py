"""Memory estimate of each kind of job, before anything is loaded.

Weights count exactly (from the safetensors headers). Around them: ``tune`` keeps a copy of the base
weights, an fp32 master and one fp32 perturbation of the tuned scope beside the working weights; a
forward pass needs a few activations, a scan or probe also a few vocabulary-wide rows.
"""

from dataclasses import dataclass

from zo_core.models.catalog import BYTES_PER_VALUE, ModelInfo

FP32 = 4
NOISE_BOUND = 64_000_000
"""Largest scope, in values, whose perturbation is kept for a step (see zo/noise.py)."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of device memory that each use needs in total, weights included."""

    weights: int
    scan: int
    probe: int
    tune_layer: int
    tune_full: int


def estimate(info: ModelInfo, dtype: str, rows: int = 16, tokens: int = 256) -> MemoryEstimate:
    """Estimate the memory of each use.

    Args:
        info: the model, from :func:`zo_core.models.catalog.describe`.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        rows: sequences in one forward pass.
        tokens: tokens of the longest sequence.
    """
    size = BYTES_PER_VALUE[dtype]
    weights = info.parameters * size
    wide = info.intermediate_size or 4 * info.hidden_size
    # The widest moment of a block: residual, normed input, gate, up and their product.
    activations = rows * tokens * (3 * info.hidden_size + 3 * wide) * size
    logits = rows * info.vocab_size * FP32

    def tuned(values: int) -> int:
        base, master, noise = values * size, values * FP32, min(values, NOISE_BOUND) * FP32
        return weights + base + master + noise + activations + logits

    return MemoryEstimate(
        weights=weights,
        scan=weights + activations + rows * tokens * info.hidden_size * FP32,
        probe=tuned(info.layer_parameters) + 2 * logits,
        tune_layer=tuned(info.layer_parameters),
        tune_full=tuned(info.parameters),
    )
