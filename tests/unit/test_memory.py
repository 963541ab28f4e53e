"""The memory estimate against what runs really hold."""

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from zo_core.jobs import ModelFields, TuneJob
from zo_core.models.load import LoadedModel, load
from zo_core.models.memory import tuned_values, tuning
from zo_core.scope_spec import parse
from zo_core.tasks.scoring import task_loss
from zo_core.tasks.templates import Candidate, Example
from zo_core.zo.forward import FastForward
from zo_core.zo.scope import Draw, Point
from zo_core.zo.scopes import select
from zo_core.zo.trainer import Progress, make_optimizer, make_scope, train

ROWS, TOKENS = 8, 32
EXAMPLES = [
    Example(
        candidates=tuple(
            Candidate((*[(31 * i + 7 * j) % 8000 + 2 for j in range(TOKENS)], answer), TOKENS)
            for answer in (5, 6)
        ),
        label=0,
        truncated=False,
    )
    for i in range(ROWS)
]
"""Two candidates of one token each share a prompt, so that a row is exactly TOKENS long."""


class Live(TorchDispatchMode):
    """Bytes of tensors made within, at the moment when most are alive."""

    def __init__(self) -> None:
        """Nothing is alive yet."""
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count."""
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        made = op(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor)]


def held(tensors: Any) -> int:
    """Bytes of all tensors in a structure."""
    return sum(t.nbytes for t in _tensors(tensors))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """The bundled model on the CPU."""
    return load(ModelFields(device="cpu", dtype=request.param))


@pytest.mark.parametrize(
    "fields",
    [
        {"scope": "layer:8"},
        {"scope": "layer:8", "optimizer": "adamm", "directions": 2},
        {"scope": "layers:3,9", "optimizer": "momentum", "estimator": "one-sided"},
        {"scope": "full"},
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_what_a_run_holds(loaded: LoadedModel, fields: dict[str, Any]) -> None:
    """Weights, master, moments, copies, noise and cache, to the byte."""
    job = TuneJob(steps=1, batch_size=ROWS, **fields)
    spec = parse(job.scope)
    selection = select(loaded, spec)
    scope, optimizer = make_scope(job, selection), make_optimizer(job)
    forward = FastForward(loaded, selection.lowest or 0)
    forward.register(EXAMPLES)
    records: list[dict[str, Any]] = []
    try:
        train(job, loaded, forward, scope, optimizer, EXAMPLES, Progress(), records.append)
        wanted = tuning(
            loaded.info,
            loaded.dtype_name,
            tuned_values(loaded.info, spec.form, len(spec.layers)),
            rows=ROWS,
            tokens=TOKENS,
            optimizer=job.optimizer,
            estimator=job.estimator,
            directions=job.directions,
            cached_tokens=ROWS * TOKENS if selection.lowest else 0,
        )
        assert wanted.weights == held(list(loaded.model.parameters()))
        assert wanted.base == held(scope._base)
        assert wanted.master == held(scope.master)
        assert wanted.moments == held(optimizer.state())
        assert wanted.copies == held(forward._weights)
        assert wanted.noise == held(scope._noise)
        assert wanted.prefix_cache == held(forward._frozen._cache)
    finally:
        scope.close()
        selection.close()


def test_the_cache_is_bounded(loaded: LoadedModel) -> None:
    """However much data there is; and a run can do without."""
    few, many = (
        tuning(loaded.info, "bfloat16", 1000, cached_tokens=n, device_bytes=2**30)
        for n in (10, 10**9)
    )
    assert few.prefix_cache == 10 * loaded.info.hidden_size * 2
    assert many.prefix_cache == 2**30 // 5
    assert few.needed == many.needed < few.total < many.total


def test_what_a_forward_pass_adds(loaded: LoadedModel) -> None:
    """Both points side by side, at the highest: from two thirds of the estimate to a fifth more."""
    selection = select(loaded, parse("layer:8"))
    scope = make_scope(TuneJob(scope="layer:8"), selection)
    forward = FastForward(loaded, 8)
    prepared = forward.prepare(EXAMPLES)
    draw = Draw("gaussian", 0, 1)
    points = [Point(draw, 1e-3), Point(draw, -1e-3)]
    values = loaded.info.layer_parameters
    wanted = tuning(loaded.info, loaded.dtype_name, values, rows=ROWS, tokens=TOKENS)
    try:
        forward.logits_at(prepared, scope, points)  # makes what is held
        with Live() as live:
            task_loss(forward.logits_at(prepared, scope, points), prepared.scored)
    finally:
        scope.close()
        selection.close()
    assert 2 / 3 < live.peak / (wanted.activations + wanted.logits) < 1.2
