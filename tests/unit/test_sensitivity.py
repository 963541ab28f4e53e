"""Sensitivity and propagation against brute force, and laws that they must obey."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit import families
from zo_core import runs
from zo_core.analysis.ablation import ablation
from zo_core.analysis.epsilon import linear_ranges, recommended_eps
from zo_core.analysis.gradients import distribution
from zo_core.analysis.probe import Probe
from zo_core.analysis.scaling import scale_factors
from zo_core.analysis.sensitivity import CALIBRATED, ProbeSettings
from zo_core.errors import UserError
from zo_core.jobs import ModelFields, ProbeJob
from zo_core.models.decoder import Decoder
from zo_core.models.load import LoadedModel, load
from zo_core.progress import JobContext
from zo_core.recipes.probe import run_probe
from zo_core.runs import Process
from zo_core.settings import settings as zo_settings
from zo_core.tasks.scoring import task_loss
from zo_core.tasks.templates import Candidate, Example
from zo_core.zo.layerwise import LayerwiseBatch
from zo_core.zo.noise import perturbation
from zo_core.zo.reference import ReferenceForward
from zo_core.zo.scope import scope_parameters

SETTINGS = ProbeSettings(draws=2, eps=1e-2, noise="gaussian", seed=7)


def examples() -> list[Example]:
    """Two rows with two candidates of two tokens each, so that candidates share a prompt."""
    found = []
    for start, length in ((10, 6), (300, 9)):
        prompt = tuple(range(start, start + length))
        answers = ((40, 41), (50, 51, 52))
        candidates = tuple(Candidate(prompt + a, length) for a in answers)
        found.append(Example(candidates, label=1, truncated=False))
    return found


def tiny_model(family: str, folder: Path) -> LoadedModel:
    families.save(families.build(family), folder)
    return load(ModelFields(model=str(folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random Llama."""
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@torch.no_grad()
def token_states(loaded: LoadedModel) -> list[list[torch.Tensor]]:
    """Block outputs [C] of every distinct token of the examples, each row alone: [layer][token]."""
    outputs: list[list[torch.Tensor]] = [[] for _ in loaded.decoder.blocks]
    for example in examples():
        seen: set[tuple[int, ...]] = set()
        for candidate in example.candidates:
            row = candidate.tokens[:-1]
            states: list[torch.Tensor] = []
            handles = [
                b.register_forward_hook(
                    lambda _m, _a, o, states=states: states.append(
                        (o[0] if isinstance(o, tuple) else o)[0].clone()
                    )
                )
                for b in loaded.decoder.blocks
            ]
            loaded.model(input_ids=torch.tensor([row]), use_cache=False)
            for handle in handles:
                handle.remove()
            new = [i for i in range(len(row)) if row[: i + 1] not in seen]
            seen |= {row[: i + 1] for i in new}
            for layer, hidden in enumerate(states):
                outputs[layer] += [hidden[i] for i in new]
    return outputs


def test_propagation_and_gradient_equal_brute_force(tiny: LoadedModel) -> None:
    layer, eps = 2, SETTINGS.eps
    tables = Probe(tiny, [LayerwiseBatch(tiny, examples())], [layer], SETTINGS).run()
    found = tables.frames()
    reference = ReferenceForward(tiny)
    prepared = reference.prepare(examples())
    base = token_states(tiny)
    parameters = scope_parameters(tiny, layer)
    kept = {n: p.clone() for n, p in parameters.items()}
    changes, gradients = [], []
    for draw in range(SETTINGS.draws):
        losses = []
        for sign in (1, -1):
            for name, p in parameters.items():
                z = perturbation("gaussian", SETTINGS.seed, draw + 1, name, p.shape)
                p.copy_(kept[name] + sign * eps * z)
            moved = token_states(tiny)
            losses.append(float(task_loss(reference.logits(prepared), prepared.scored)))
            changes.append(
                [
                    np.mean([float((a - b).norm() / b.norm()) for a, b in zip(*pair, strict=True)])
                    for pair in zip(moved[layer:], base[layer:], strict=True)
                ]
            )
        gradients.append((losses[0] - losses[1]) / (2 * eps))
    for name, p in parameters.items():
        p.copy_(kept[name])
    expected = np.mean(changes, axis=0)
    table = found["propagation"]
    assert list(table["block"]) == list(range(layer, len(tiny.decoder)))
    assert table["relative_change"].to_numpy() == pytest.approx(expected, rel=1e-4)
    assert table["amplification"].to_numpy() == pytest.approx(expected / expected[0], rel=1e-4)
    draws = found["draws"]
    g = draws[draws["metric"] == "projected_gradient"]["value"]
    assert g.tolist() == pytest.approx(gradients, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_fast_path_equals_reference_and_weights_come_back(family: str, tmp_path: Path) -> None:
    loaded = tiny_model(family, tmp_path)
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    found = []
    for forward in (None, ReferenceForward(loaded)):
        batches = [LayerwiseBatch(loaded, examples(), forward) for _ in range(2)]
        settings = ProbeSettings(1, 1e-2, "rademacher", 3, (1e-3, 1e-2, 1e-1))
        probe = Probe(loaded, batches, [0, 4], settings, ("count", "rms", "output"))
        ticks: list[int] = []
        found.append(probe.run(ticks.append).frames())
        assert len(ticks) == probe.pairs
    for name, table in found[0].items():
        other = found[1][name]
        assert list(table.columns) == list(other.columns)
        numbers = table.select_dtypes("number").columns
        for column in numbers:
            np.testing.assert_allclose(table[column], other[column], rtol=2e-3, atol=2e-4)
    for name, p in loaded.model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_equalised_layers_change_their_own_output_alike(tiny: LoadedModel) -> None:
    probe = Probe(tiny, [LayerwiseBatch(tiny, examples())], [0, 2, 5], SETTINGS, ("output",))
    frames = probe.run().frames()
    scaled = frames["scalings"]
    own = scaled[scaled["metric"] == "own_output_change"]["value"]
    assert own.to_numpy() == pytest.approx(probe.target, rel=CALIBRATED)
    table = ablation(frames["draws"], scaled)
    assert table["equalised_own_change"].to_numpy() == pytest.approx(probe.target, rel=CALIBRATED)
    plain = table["plain_own_change"]
    assert plain.max() / plain.min() - 1 > 3 * CALIBRATED, "there was something to equalise"


def test_scale_factors(tiny: LoadedModel) -> None:
    table = scale_factors(tiny)
    assert (table["count"] == 1.0).all()
    sizes = [sum(p.numel() for p in b.parameters()) for b in tiny.decoder.blocks]
    assert table["parameters"].tolist() == sizes
    weights = list(tiny.decoder.blocks[1].parameters())
    try:
        for p in weights:
            p.mul_(2.0)
        moved = scale_factors(tiny)
    finally:
        for p in weights:
            p.mul_(0.5)
    ratio = moved["rms"] / moved["rms"].drop(1).mean()
    before = table["rms"] / table["rms"].drop(1).mean()
    assert ratio[1] == pytest.approx(2 * before[1])
    assert moved["rms"].mean() == pytest.approx(1.0)


class LinearBlock(nn.Module):
    """h + W h: linear in its input and in its weights."""

    def __init__(self, channels: int) -> None:
        """Random weights."""
        super().__init__()
        self.map = nn.Linear(channels, channels, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of the same shape."""
        return hidden + self.map(hidden)


class LinearModel(nn.Module):
    """A language model of linear blocks, as far as the reference path asks for one."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.embed = nn.Embedding(400, 16)
        self.blocks = nn.ModuleList(LinearBlock(16) for _ in range(4))
        self.head = nn.Linear(16, 400, bias=False)

    def forward(self, input_ids: torch.Tensor, **_options: object) -> SimpleNamespace:
        """Logits at every token."""
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def test_in_a_linear_model_changes_are_linear_in_eps() -> None:
    torch.manual_seed(0)
    model = LinearModel().requires_grad_(False).double()
    for p in model.parameters():
        p.data = p.data.float()
    loaded = SimpleNamespace(
        model=model,
        decoder=Decoder("blocks", tuple(model.blocks)),
        device=torch.device("cpu"),
        name="linear",
    )
    found = []
    for eps in (1e-2, 4e-2):
        batch = LayerwiseBatch(loaded, examples(), ReferenceForward(loaded))
        settings = ProbeSettings(3, eps, "gaussian", 0)
        found.append(Probe(loaded, [batch], [0, 1, 3], settings).run().frames()["propagation"])
    small, large = found
    np.testing.assert_allclose(large["relative_change"], 4 * small["relative_change"], rtol=1e-3)
    np.testing.assert_allclose(large["amplification"], small["amplification"], rtol=1e-3)


def test_identical_batches_agree_in_every_sign(tiny: LoadedModel) -> None:
    batch = LayerwiseBatch(tiny, examples())
    tables = Probe(tiny, [batch] * 3, [1, 4], SETTINGS).run()
    one = Probe(tiny, [batch], [1, 4], SETTINGS).run()
    table = distribution(
        pd.DataFrame(tables.batches, columns=["layer", "draw", "batch", "projected_gradient"])
    )
    assert (table["sign_agreement"] == 1.0).all()
    assert (table["snr"] > 1e3).all()
    assert [v for *_, v in tables.draws] == pytest.approx([v for *_, v in one.draws])
    alone = distribution(
        pd.DataFrame(one.batches, columns=["layer", "draw", "batch", "projected_gradient"])
    )
    assert alone[["snr", "sign_agreement"]].isna().all(axis=None)
    assert alone["mean"].tolist() == pytest.approx(table["mean"].tolist())


GRADIENTS = st.integers(2, 5).flatmap(
    lambda batches: st.lists(
        st.lists(st.floats(-10, 10), min_size=batches, max_size=batches), min_size=1, max_size=6
    )
)


@given(GRADIENTS)
@settings(max_examples=60, deadline=None)
def test_sign_agreement_counts_pairs(g: list[list[float]]) -> None:
    rows = [(0, d, b, v) for d, of_draw in enumerate(g) for b, v in enumerate(of_draw)]
    table = pd.DataFrame(rows, columns=["layer", "draw", "batch", "projected_gradient"])
    row = distribution(table).iloc[0]
    pairs = [np.sign(x) * np.sign(y) > 0 for d in g for x, y in itertools.combinations(d, 2)]
    assert row["sign_agreement"] == pytest.approx(np.mean(pairs))
    assert row["mean"] == pytest.approx(np.mean(g))
    flipped = distribution(table.assign(projected_gradient=-table["projected_gradient"])).iloc[0]
    assert flipped["sign_agreement"] == row["sign_agreement"]
    assert flipped["snr"] == pytest.approx(row["snr"])


def sweep(eps: list[float], g: list[list[float]]) -> pd.DataFrame:
    """A sweep of layer 0: g[eps][draw]."""
    rows = [(0, e, d, v) for e, values in zip(eps, g, strict=True) for d, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["layer", "eps", "draw", "projected_gradient"])


@given(
    st.lists(st.floats(0.5, 5), min_size=1, max_size=4),
    st.floats(1.0, 1e5),
    st.floats(1e-12, 1e-7),
)
@settings(max_examples=60, deadline=None)
def test_linear_range_of_a_known_curve(
    slopes: list[float], curvature: float, rounding: float
) -> None:
    """g(eps) = slope (1 + curvature eps^2 + rounding / eps): both errors are known."""
    eps = [10.0**-k for k in range(1, 8)]
    error = {e: curvature * e * e + rounding / e for e in eps}
    g = [[s * (1 + error[e]) for s in slopes] for e in eps]
    row = linear_ranges(sweep(eps, g)).iloc[0]
    if math.isnan(row["recommended"]):
        close = sorted(error.values())[:2]
        assert close[1] > 0.05
        return
    assert row["lowest"] < row["highest"] == row["recommended"]
    inside = [error[e] for e in eps if row["lowest"] <= e <= row["highest"]]
    spread = max(inside) - min(inside)
    assert spread <= 0.25 * (1 + min(inside)), "g is nearly constant in the range"
    # One eps further up, curvature must show.
    above = [e for e in eps if e > row["highest"]]
    if above:
        assert abs(error[min(above)] - min(inside)) > 0.09


def test_recommended_eps_is_good_for_every_layer() -> None:
    columns = ["layer", "lowest", "highest", "recommended"]
    rows = [(0, 1e-5, 1e-2, 1e-2), (1, 1e-6, 1e-3, 1e-3)]
    assert recommended_eps(pd.DataFrame(rows, columns=columns))[0] == 1e-3
    apart = [(0, 1e-2, 1e-1, 1e-1), (1, 1e-6, 1e-3, 1e-3)]
    assert recommended_eps(pd.DataFrame(apart, columns=columns))[0] is None
    none = [(0, 1e-5, 1e-2, 1e-2), (7, math.nan, math.nan, math.nan)]
    eps, reason = recommended_eps(pd.DataFrame(none, columns=columns))
    assert eps is None
    assert "layer 7" in reason


def test_recipe_writes_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zo_settings(), "cache_dir", tmp_path / "cache")
    families.save(families.build("llama"), tmp_path / "model")
    job = ProbeJob(
        model=str(tmp_path / "model"),
        device="cpu",
        dtype="float32",
        draws=2,
        batch_size=4,
        batches=2,
        layers=[0, 2, 3, 5],
        eps_sweep="1e-3,1e-2,1e-1",
        scalings="output,rms",
    )
    run = runs.create(job, Process.current())
    run_probe(job, run, JobContext(run))
    draws = pd.read_csv(run.result("draws.csv"))
    assert list(draws.columns) == ["layer", "draw", "metric", "value"]
    names = "layers propagation gradients gradients_by_batch sweep linear_range scalings"
    for name in [*names.split(), "scaled_layers", "ablation"]:
        table = pd.read_parquet(run.result(f"{name}.parquet"))
        assert set(table["layer"]) == {0, 2, 3, 5}, name
    summary = run.result_json()
    assert summary["batches"] == 2
    assert set(summary["most_sensitive_scaled"]) == {"none", "output", "rms"}
    assert "recommended_eps" in summary
    pairs = 4 * 2 * (2 * 3 + 2)  # eps itself is one of the sweep
    assert summary["forward_passes"] == 2 * pairs + 2
    assert run.status().total == pairs


def test_too_few_rows_for_different_batches_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zo_settings(), "cache_dir", tmp_path / "cache")
    job = ProbeJob(batches=64, batch_size=16, device="cpu")
    run = runs.create(job, Process.current())
    with pytest.raises(UserError, match="batches: reviews has .* lower batches or batch_size"):
        run_probe(job, run, JobContext(run))
