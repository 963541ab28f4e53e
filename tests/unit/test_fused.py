"""Steps queued on a GPU: the same ledger and the same bits, however they are run."""

from typing import Any

import pytest
import torch

from zo_core.jobs import ModelFields, TuneJob
from zo_core.models.load import LoadedModel, load
from zo_core.progress import Cancelled
from zo_core.scope_spec import parse
from zo_core.tasks.data import load_task
from zo_core.tasks.templates import Example, encode
from zo_core.zo.forward import FastForward
from zo_core.zo.fp8 import why_not
from zo_core.zo.fused import FusedSteps
from zo_core.zo.scope import TunedScope, scope_parameters
from zo_core.zo.scopes import select
from zo_core.zo.trainer import LossNotFiniteError, Progress, make_optimizer, replay, train

pytestmark = pytest.mark.gpu
STEPS = 40


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    """The bundled model in bfloat16 on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return load(ModelFields(device="cuda", dtype="bfloat16"))


@pytest.fixture(scope="module")
def examples(demo: LoadedModel) -> list[Example]:
    """Rows of the bundled task."""
    data = load_task("reviews")
    return [encode(data.task, row, demo.tokenizer, demo.context) for row in data.train[:100]]


def run(
    demo: LoadedModel,
    examples: list[Example],
    job: TuneJob,
    graphs: bool = True,
    looks: int = 1000,
    stop: int = 0,
    fp8: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Ledger and true weights of a run."""
    layer = None if job.scope == "full" else 3
    forward = FastForward(demo, layer or 0, graphs=True, compiled=fp8, fp8=fp8)
    forward.use_graphs(graphs)
    forward.register(examples)
    scope = TunedScope(scope_parameters(demo, layer))
    ledger: list[dict[str, Any]] = []

    def on_step(record: dict[str, Any]) -> None:
        ledger.append({k: v for k, v in record.items() if k != "seconds"})
        if record["step"] == stop:
            raise Cancelled

    try:
        train(
            job,
            demo,
            forward,
            scope,
            make_optimizer(job),
            examples,
            Progress(),
            on_step,
            lambda step: step % looks == 0,
        )
    except Cancelled:
        pass
    finally:
        weights = {n: m.clone() for n, m in scope.master.items()}
        working = {n: p.clone() for n, p in scope.parameters.items()}
        scope.close()
    for name, tensor in weights.items():
        assert torch.equal(working[name], tensor.to(working[name].dtype)), name
    return ledger, weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal, bit for bit."""
    return all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("scope", ["layer:3", "full"])
def test_graphs_and_waiting_change_nothing(
    demo: LoadedModel, examples: list[Example], noise: str, scope: str
) -> None:
    """Same ledger and weights with graphs on and off, queued or settled at every step."""
    job = TuneJob(steps=STEPS, noise=noise, scope=scope, lr=1e-4)
    ledger, weights = run(demo, examples, job)
    assert [r["step"] for r in ledger] == list(range(1, STEPS + 1))
    for other in (run(demo, examples, job, graphs=False), run(demo, examples, job, looks=1)):
        assert other[0] == ledger
        assert same(other[1], weights)


def test_graphs_of_an_fp8_suffix_change_nothing(demo: LoadedModel, examples: list[Example]) -> None:
    """Captured or not, an fp8 suffix is the same bits, and not those of the model's arithmetic."""
    if why_not(demo.device, demo.dtype):
        pytest.skip("no fp8 matrix units here")
    job = TuneJob(steps=STEPS, scope="layer:3", lr=1e-4)
    ledger, weights = run(demo, examples, job, fp8=True)
    other = run(demo, examples, job, graphs=False, fp8=True)
    assert other[0] == ledger
    assert same(other[1], weights)
    plain, _ = run(demo, examples, job)
    assert [r["loss"] for r in plain] != [r["loss"] for r in ledger]
    assert plain[0]["loss"] == pytest.approx(ledger[0]["loss"], abs=0.05)


def test_graphs_of_float32_change_nothing(examples: list[Example]) -> None:
    """They are captured like those of bfloat16, and TF32 stays off."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    assert not torch.backends.cuda.matmul.allow_tf32
    wide = load(ModelFields(device="cuda", dtype="float32"))
    job = TuneJob(steps=STEPS, scope="layer:3", lr=1e-4)
    ledger, weights = run(wide, examples, job)
    other = run(wide, examples, job, graphs=False)
    assert other[0] == ledger
    assert same(other[1], weights)


def test_masked_scopes_are_queued_too(demo: LoadedModel, examples: list[Example]) -> None:
    """Sparse: the ledger replays to the bits, and nothing outside the mask moves."""
    job = TuneJob(steps=STEPS, scope="sparse:25", lr=1e-5)
    selection = select(demo, parse(job.scope))
    scope = TunedScope(selection.parameters, selection.masks)
    assert FusedSteps.apply_to(job, scope)
    before = scope.snapshot()
    ledger: list[dict[str, Any]] = []
    forward = FastForward(demo, 0, graphs=True)
    optimizer = make_optimizer(job)
    train(
        *(job, demo, forward, scope, optimizer, examples, Progress(), ledger.append),
        lambda step: step == STEPS,
    )
    after = scope.snapshot()
    scope.close()
    again = TunedScope(selection.parameters, selection.masks)
    replay(job, again, make_optimizer(job), ledger)
    assert same(again.master, after)
    again.close()
    assert not same(before, after)
    for name, mask in selection.masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask]), name


@pytest.mark.parametrize("stop", [0, 17])
def test_replay_rebuilds_the_bits(demo: LoadedModel, examples: list[Example], stop: int) -> None:
    """The loop that waits, from the ledger alone, ends at the bits of the queued one."""
    job = TuneJob(steps=STEPS, scope="layer:3", lr=1e-4)
    ledger, weights = run(demo, examples, job, stop=stop)
    scope = TunedScope(scope_parameters(demo, 3))
    replay(job, scope, make_optimizer(job), ledger)
    assert same(scope.master, weights)
    scope.close()


def test_not_finite_keeps_the_weights_of_the_step_before(
    demo: LoadedModel, examples: list[Example]
) -> None:
    """Steps queued behind the broken one change nothing."""
    job = TuneJob(steps=STEPS, scope="layer:3").model_copy(update={"lr": 1e36})
    forward = FastForward(demo, 3, graphs=True)
    scope = TunedScope(scope_parameters(demo, 3))
    ledger: list[dict[str, Any]] = []
    with pytest.raises(LossNotFiniteError, match="step"):
        train(
            job,
            demo,
            forward,
            scope,
            make_optimizer(job),
            examples,
            Progress(),
            ledger.append,
            lambda _s: False,
        )
    weights = {n: m.clone() for n, m in scope.master.items()}
    scope.close()
    again = TunedScope(scope_parameters(demo, 3))
    replay(job, again, make_optimizer(job), ledger)
    assert same(again.master, weights)
    again.close()
