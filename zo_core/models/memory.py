"""Memory estimate of each kind of job, before anything is loaded. No torch here.

Weights count exactly (from the safetensors headers); what a tuning run adds is :class:`Tuning`. A
forward pass needs a few activations, a scan or probe also a few vocabulary-wide rows.
"""

from dataclasses import dataclass, fields

from zo_core.models.catalog import BYTES_PER_VALUE, ModelInfo

FP32 = 4
NOISE_BOUND = 64_000_000
"""Largest scope, in values, whose perturbation is kept for a step (see zo/noise.py)."""

PAIRED_SHARE = 0.25
"""Largest share of the model that is tuned with the weights of several points held side by side;
above it, memory counts more, and nearly the whole model would be run per point anyway."""

CACHE_SHARE = 5
"""The prefix cache takes at most this part of a GPU, one in so many."""

CPU_CACHE = 512 * 2**20
"""Bytes that it takes at most on a CPU."""

MOMENTS = {"momentum": 1, "adamm": 3, "adamw": 2}
"""Float32 tensors of the scope's size that an optimizer keeps."""

LORA_RANK = 8
PREFIX_LENGTH = 5
STATIC_INPUTS = 2
"""Times the largest batch that the graphs' input takes: it may have had to grow."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Bytes that a tuning run holds, by what for.

    P values in the model and S in the scope, s bytes a working value, n points a step side by side,
    T tokens a batch, H hidden size, I intermediate size, V vocabulary.
    """

    weights: int
    """P s."""
    base: int
    """S s: the working weights as they were, to be given back."""
    master: int
    """4 S; 0 for ``inplace``."""
    moments: int
    """4 S k with k = 1 for momentum, 3 for adamm, 2 for adamw, else 0."""
    gradients: int
    """S (s + 4) for adamw: a gradient in the working dtype and its float32 copy."""
    copies: int
    """n S s: the scope's weights at every point, where S <= P / 4 and the fast path runs."""
    fp8: int
    """One byte for each weight of the layers above the tuned ones, if they are in fp8; all other
    layers are taken to be."""
    noise: int
    """4 S q for q directions, at most 256 MB; 0 on a GPU where kernels make z on the way."""
    prefix_cache: int
    """At most: H s for every token of the data, within a fifth of a GPU or 512 MiB of a CPU."""
    activations: int
    """n T (3 H + 3 I) s: the widest moment of a block - residual, normed input, attention or MLP
    output, gate, up and their product - for all points at once. The reference path runs a row for
    each candidate, taken to be two; adamw keeps 2 T H s a layer for the way back; of an fp8 suffix
    they are float32."""
    logits: int
    """8 n R V for R rows: float32 logits at one place a row, and their log-softmax; of at most 2
    points where they do not run side by side. On the reference path 2 T V s, as every position has
    logits, and three times that with a gradient."""
    graphs: int
    """On a GPU: a pool as large as ``activations`` and ``logits`` that all graphs
    share, and 2 n T H s of static input."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def needed(self) -> int:
        """Without what a run gives up when memory is short: prefix cache and graphs."""
        return self.total - self.prefix_cache - self.graphs


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of device memory that each use needs in total, weights included."""

    weights: int
    scan: int
    probe: int
    tune_layer: int
    tune_full: int


def tuned_values(info: ModelInfo, form: str, layers: int) -> int:
    """Values in the tensors that a scope tunes; for parts of a layer, those of the whole layer.

    Args:
        info: the model.
        form: the scope's form, see :mod:`zo_core.scope_spec`.
        layers: how many layers it names.
    """
    if form == "lora":  # q and v, in and out; peft's default targets of most families
        return (layers or info.n_layers) * 2 * LORA_RANK * 2 * info.hidden_size
    if form == "prefix":
        return info.n_layers * 2 * PREFIX_LENGTH * info.hidden_size
    if form in {"full", "sparse"}:
        return info.parameters
    if form == "all-but":
        return info.parameters - info.layer_parameters
    return max(1, layers) * info.layer_parameters


def tuning(
    info: ModelInfo,
    dtype: str,
    values: int,
    *,
    rows: int = 16,
    tokens: int = 256,
    optimizer: str = "zo-sgd",
    estimator: str = "two-sided",
    directions: int = 1,
    inplace: bool = False,
    reference: bool = False,
    cached_tokens: int = 0,
    device_bytes: int | None = None,
    fp8: bool = False,
) -> Tuning:
    """Estimate what a tuning run holds; the formula of each part is in :class:`Tuning`.

    Args:
        info: the model, from :func:`zo_core.models.catalog.describe`.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        values: S, as :func:`tuned_values` says.
        rows: examples in a batch.
        tokens: tokens of the longest.
        optimizer: as in the job.
        estimator: as in the job.
        directions: q.
        inplace: no master is kept.
        reference: the reference path runs.
        cached_tokens: tokens of the data whose prefixes are cached; 0 if no layer is frozen below.
        device_bytes: memory of the GPU; None: a CPU.
        fp8: the suffix is in fp8.
    """
    size, gpu = BYTES_PER_VALUE[dtype], device_bytes is not None
    first_order = optimizer == "adamw"
    plain = reference or first_order
    points = 1 if first_order else directions + 1 if estimator == "one-sided" else 2 * directions
    paired = not plain and values <= PAIRED_SHARE * info.parameters
    batch = rows * tokens * (2 if plain else points if paired else 1)
    wide = info.intermediate_size or 4 * info.hidden_size
    activations = batch * (3 * info.hidden_size + 3 * wide) * (FP32 if fp8 else size)
    if first_order:
        activations += info.n_layers * batch * info.hidden_size * size
    logits = 2 * (points if paired else min(points, 2)) * rows * info.vocab_size * FP32
    if plain:
        logits = batch * info.vocab_size * size * (3 if first_order else 1)
    graphed = gpu and not plain
    room = device_bytes // CACHE_SHARE if device_bytes is not None else CPU_CACHE
    cache = cached_tokens * info.hidden_size * size
    fused = gpu and optimizer == "zo-sgd" and not inplace
    return Tuning(
        weights=info.parameters * size,
        base=values * size,
        master=0 if inplace else values * FP32,
        moments=values * FP32 * MOMENTS.get(optimizer, 0),
        gradients=values * (size + FP32) if first_order else 0,
        copies=points * values * size if paired else 0,
        fp8=(info.n_layers - 1) * info.layer_parameters if fp8 else 0,
        noise=0 if fused or first_order else min(values * directions, NOISE_BOUND) * FP32,
        prefix_cache=0 if plain else min(cache, room),
        activations=activations,
        logits=logits,
        graphs=(
            activations + logits + STATIC_INPUTS * batch * info.hidden_size * size if graphed else 0
        ),
    )


def estimate(
    info: ModelInfo,
    dtype: str,
    rows: int = 16,
    tokens: int = 256,
    device_bytes: int | None = None,
) -> MemoryEstimate:
    """Estimate the memory of each use, tuning with the default job and no prefix cache.

    Args:
        info: the model, from :func:`zo_core.models.catalog.describe`.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        rows: sequences in one forward pass.
        tokens: tokens of the longest sequence.
        device_bytes: memory of the GPU; None: a CPU.
    """
    size = BYTES_PER_VALUE[dtype]
    layer, full = (
        tuning(info, dtype, values, rows=rows, tokens=tokens, device_bytes=device_bytes)
        for values in (info.layer_parameters, info.parameters)
    )
    wide = info.intermediate_size or 4 * info.hidden_size
    activations = rows * tokens * (3 * info.hidden_size + 3 * wide) * size
    return MemoryEstimate(
        weights=layer.weights,
        scan=layer.weights + activations + rows * tokens * info.hidden_size * FP32,
        probe=layer.total - layer.graphs + layer.logits,
        tune_layer=layer.total,
        tune_full=full.total,
    )
