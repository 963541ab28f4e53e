"""A comparison's spec: its sentences, presets, budgets and the cells that follow."""

from pathlib import Path
from typing import Any

import pytest

from zo_core.compare.budget import passes_per_step
from zo_core.compare.cells import Cell, make_plan
from zo_core.compare.files import as_yaml, make_spec, parse_fields, placed, read_fields
from zo_core.compare.outcomes import DIVERGED, FAILED, Outcome
from zo_core.compare.presets import PRESETS
from zo_core.compare.spec import COMMON, CompareSpec
from zo_core.errors import UserError
from zo_core.jobs import ProbeJob, TuneJob, recommended_lr
from zo_core.preflight import check

ARMS = [{"name": "full", "scope": "full"}, {"name": "one", "scope": "layer:auto"}]


def spec_of(**fields: Any) -> CompareSpec:
    return make_spec({"arms": ARMS, "steps": 12} | fields, {})


def arm(**fields: Any) -> dict[str, Any]:
    return {"arms": [*ARMS, {"name": "x", "scope": "layer:1"} | fields]}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"arms": []}, "arms is []: list should have at least 1 item"),
    ({"steps": None}, "steps or forward_passes sets the budget: give one of the two"),
    ({"forward_passes": 10}, "steps or forward_passes sets the budget: give one of the two"),
    ({"stepz": 3}, "stepz is not a field of this job"),
    ({"seeds": [1, 1]}, "seeds name 1 twice: leave one out"),
    ({"seeds": [-1]}, "seed is -1: input should be greater than or equal to 0"),
    ({"tasks": ["Bad task"]}, "task 'Bad task' is not valid"),
    ({"baseline": "y"}, "baseline 'y' is no arm: choose full, one"),
    ({"lr_factors": [0]}, "lr_factors must be above 0"),
    ({"batch_size": 0}, "batch_size is 0: input should be greater than or equal to 1"),
    ({"common": {"steps": 3}}, "common has no field steps that can be set here: choose accumulate"),
    ({"dev_examples": 0}, "dev_examples is 0: the learning rate is chosen on dev rows"),
    (arm(name="one"), "arms name 'one' twice: give every arm its own name"),
    (arm(scope="layer:x"), "'layer:x' is unknown: choose full"),
    (arm(lr=0), "must hold learning rates above 0"),
    (arm(optimizer="adam"), "optimizer 'adam' is not valid"),
    (arm(model="gpt2"), "model is not a field of this job"),
    (arm(directions=7), "arm 'x' needs 14 forward passes a step, and the budget is 2"),
    (arm(optimizer="adamw", precision="inplace"), "arm 'x': precision inplace is for zeroth-order"),
    ({"arms": [{"name": "z", "scope": "zero-shot"}]}, "arms tune nothing: add one"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_wrong_fields_are_one_sentence(fields: dict[str, Any], words: str) -> None:
    steps = {"steps": 1} if "directions" in str(fields) else {}
    with pytest.raises(UserError) as caught:
        spec_of(**(steps | fields))
    assert words in str(caught.value)
    assert "validation error" not in str(caught.value)


def test_job_fields_are_flat_in_files_and_survive_json(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "tasks: [reviews]\nseeds: [0, 1]\nforward_passes: 60\nbatch_size: 4\neps: 1e-3\narms:\n"
        "  - {name: full, scope: full}\n"
        "  - {name: q4, scope: 'layer:auto', optimizer: adamm, directions: 4, lr: [1e-4, 0.001]}\n"
        "  - {name: half, scope: 'layer:auto', precision: inplace, dtype: bfloat16, lr: 1e-4}\n"
    )
    spec = make_spec(read_fields(str(file)), {})
    assert spec.common == {"batch_size": 4, "eps": "1e-3"}
    q4 = spec.job(spec.arm("q4"), "reviews", 1, 0.001)
    assert (q4.steps, q4.batch_size, q4.directions, q4.eps) == (7, 4, 4, 1e-3)
    assert (q4.seed, q4.lr, q4.optimizer, q4.scope) == (1, 0.001, "adamm", "layer:auto")
    assert spec.job(spec.arm("half"), "reviews", 0).precision == "inplace"
    assert CompareSpec.model_validate_json(spec.model_dump_json()) == spec
    over = make_spec(read_fields(str(file)), {"steps": "5", "batch_size": "2", "seeds": ["7"]})
    assert (over.steps, over.forward_passes, over.seeds) == (5, None, [7])
    assert over.job(over.arm("full"), "reviews", 7).batch_size == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "is no preset and no file: choose quick, paper"), ("a: [", "cannot be read as YAML")]
    + [("- 1", "holds no fields")],
)
def test_unreadable_files(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "spec.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_fields(str(file))


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({}, 2),
        ({"directions": 3}, 6),
        ({"directions": 3, "estimator": "one-sided"}, 4),
        ({"optimizer": "conservative"}, 4),
        ({"optimizer": "conservative", "estimator": "one-sided", "directions": 2}, 4),
        ({"accumulate": 3}, 6),
        ({"optimizer": "adamw"}, 4),
    ],
)
def test_every_arm_gets_the_same_forward_passes(fields: dict[str, Any], passes: int) -> None:
    assert passes_per_step(TuneJob.model_validate(fields)) == passes
    spec = spec_of(**arm(**fields), steps=24)
    assert spec.budget() == 48
    assert spec.job(spec.arm("x"), "reviews", 0).steps == 48 // passes
    assert spec.job(spec.arm("one"), "reviews", 0).steps == 24


def test_steps_are_those_of_the_common_settings() -> None:
    spec = spec_of(directions=2, **arm(directions=1), steps=10)
    assert spec.budget() == 40
    assert [spec.job(a, "reviews", 0).steps for a in spec.arms] == [10, 10, 20]


def test_evaluations_are_spread_over_a_run() -> None:
    spec = spec_of(evaluations=5, **arm(directions=3), steps=30)
    assert [spec.job(a, "reviews", 0).eval_every for a in spec.arms] == [6, 6, 2]
    assert spec_of(eval_every=7).job(spec.arms[0], "reviews", 0).eval_every == 7


def test_grid_is_around_the_recommended_rate() -> None:
    spec = spec_of(**arm(lr=[3e-4, 1e-4]))
    middle = recommended_lr("demo", "full")
    assert spec.grid(spec.arm("full")) == pytest.approx([0.3 * middle, middle, 3 * middle])
    assert spec.grid(spec.arm("x")) == [1e-4, 3e-4]


def outcomes_by(losses: dict[float, float | str]) -> Any:
    """Search cells that are settled, by rate: a dev loss, or a state."""

    def outcome(cell: Cell) -> Outcome | None:
        found = losses.get(cell.lr)
        if found is None:
            return None
        if isinstance(found, str):
            return Outcome("run", found, "The disk is full.")
        summary = {"dev": {"loss": found}, "metric": "accuracy", "after": {"loss": -found}}
        return Outcome("run", "done", summary=summary)

    return outcome


def test_search_comes_first_and_the_lowest_dev_loss_wins() -> None:
    spec = spec_of(**arm(lr=[0.1, 0.2, 0.3]), seeds=[0, 1], search_steps=6, search_seed=9)
    spec.arms = spec.arms[-1:]
    first = make_plan(spec, lambda cell: None)
    assert [(c.lr, c.seed, c.steps, c.searching) for c in first.cells] == [
        (lr, 9, 6, True) for lr in (0.1, 0.2, 0.3)
    ]
    assert first.total == 5
    plan = make_plan(spec, outcomes_by({0.1: 0.6, 0.2: 0.5, 0.3: DIVERGED}))
    assert plan.choices["reviews", "x"].lr == 0.2
    assert not plan.choices["reviews", "x"].at_edge
    assert [(c.lr, c.seed, c.steps) for c in plan.cells[3:]] == [(0.2, 0, 12), (0.2, 1, 12)]


def one_arm(**fields: Any) -> CompareSpec:
    return spec_of(arms=[{"name": "x", "scope": "full", "lr": [0.1, 0.2]}], **fields)


def test_a_grid_grows_beyond_its_edge_until_the_best_is_inside() -> None:
    """One rate at a time, by the factor of the grid there, as often as allowed."""
    spec = one_arm(lr_extensions=2)
    up = {0.1: 0.6, 0.2: 0.5}
    growing = make_plan(spec, outcomes_by(up))
    assert [c.lr for c in growing.search] == [0.1, 0.2, 0.4]
    assert not growing.choices
    assert not growing.final
    inside = make_plan(spec, outcomes_by(up | {0.4: 0.7})).choices["reviews", "x"]
    assert (inside.lr, inside.added, inside.at_edge) == (0.2, 1, False)
    further = make_plan(spec, outcomes_by(up | {0.4: DIVERGED})).choices["reviews", "x"]
    assert (further.lr, further.added, further.at_edge) == (0.2, 1, False)
    bound = make_plan(spec, outcomes_by(up | {0.4: 0.4, 0.8: 0.3}))
    choice = bound.choices["reviews", "x"]
    assert (choice.lr, choice.added, choice.at_edge) == (0.8, 2, True), "said, not hidden"
    assert bound.total == len(bound.cells) == 4 + len(spec.seeds)
    assert spec.most_tries(spec.arms[0]) == 4

    down = make_plan(spec, outcomes_by({0.1: 0.5, 0.2: 0.6}))
    assert [c.lr for c in down.search] == [0.05, 0.1, 0.2]
    flat = make_plan(spec, outcomes_by({0.1: 0.5, 0.2: 0.5})).choices["reviews", "x"]
    assert (flat.lr, flat.added, flat.at_edge) == (0.1, 0, True), "nothing to gain beyond"
    fixed = make_plan(one_arm(lr_extensions=0), outcomes_by(up)).choices["reviews", "x"]
    assert (fixed.lr, fixed.added) == (0.2, 0)


def test_an_arm_whose_rates_all_fail_is_given_up() -> None:
    spec = one_arm(lr_extensions=1)
    diverged = {0.1: DIVERGED, 0.2: DIVERGED}
    assert [c.lr for c in make_plan(spec, outcomes_by(diverged)).search] == [0.05, 0.1, 0.2]
    saved = make_plan(spec, outcomes_by(diverged | {0.05: 0.5})).choices["reviews", "x"]
    assert saved.lr == 0.05
    plan = make_plan(spec, outcomes_by(diverged | {0.05: DIVERGED}))
    assert "every learning rate that was tried diverged" in plan.choices["reviews", "x"].reason
    assert len(plan.cells) == plan.total == 3
    plan = make_plan(spec, outcomes_by({0.1: DIVERGED, 0.2: FAILED}))
    assert plan.choices["reviews", "x"].reason == "The disk is full."


def test_a_search_run_that_is_also_a_final_one_is_one_cell() -> None:
    spec = spec_of(seeds=[0, 1], search_seed=0)
    plan = make_plan(
        spec, lambda cell: outcomes_by(dict.fromkeys(spec.grid(spec.arm(cell.arm)), 1.0))(cell)
    )
    assert len(plan.cells) == plan.total == 2 * (3 + 1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_jobs_the_model_can_run(name: str) -> None:
    spec = make_spec(read_fields(name), {})
    for task in spec.tasks:
        for one in spec.arms:
            if one.tunes:
                check(spec.job(one, task, spec.seeds[0]))
    # adamw's steps cost more: what is over is less than one of them.
    spent = {
        passes_per_step(j) * j.steps
        for one in spec.arms
        if one.tunes
        for j in [spec.job(one, spec.tasks[0], 0)]
    }
    assert spent == {spec.budget()}


def test_presets_hold_the_arms_they_promise() -> None:
    def scopes(name: str) -> list[str]:
        return [one.scope for one in make_spec(read_fields(name), {}).arms]

    assert scopes("quick") == [
        "zero-shot",
        "full",
        "layer:auto",
        "random-layer:1",
        "random-layer:2",
    ]
    singles = [f"layer:{k}" for k in range(16)]
    assert scopes("layers") == ["zero-shot", "full", *singles]
    assert {"all-but:auto", "full", "zero-shot", "random-layer:{seed}"} < set(scopes("falsify"))
    assert set(singles) < set(scopes("falsify"))
    inplace = [a for a in make_spec(read_fields("falsify"), {}).arms if a.settings]
    assert {(a.scope, a.settings["dtype"]) for a in inplace} == {
        (scope, dtype) for scope in ("full", "layer:auto") for dtype in ("float16", "bfloat16")
    }
    wanted = {"full", "layer:auto", "layers:auto,14", "attention:auto", "mlp:auto", "prefix"}
    wanted |= {"channels:auto:top1%", "channels:auto:rest1%", "all-but:auto", "lora", "lora:auto"}
    wanted |= {"random-layer:1", "random-layer:2", "sparse:25%", "zero-shot"}
    assert set(scopes("scopes")) == wanted
    assert len(make_spec(read_fields("scopes"), {}).seeds) == 3
    assert "adamw" in {one.optimizer for one in make_spec(read_fields("paper"), {}).arms}


def test_a_random_layer_may_differ_by_seed() -> None:
    spec = make_spec(read_fields("falsify"), {})
    shuffled = spec.arm("shuffled-rule")
    assert spec.job(shuffled, "reviews", 4).scope == "random-layer:4"


def test_common_fields_are_those_of_a_job() -> None:
    assert set(TuneJob.model_fields) > COMMON
    assert not {"scope", "lr", "seed", "task", "steps", "optimizer"} & COMMON


def test_scan_and_probes_are_part_of_comparisons_of_layers() -> None:
    spec = make_spec(read_fields("layers"), {"tasks": ["reviews", "sst2"], "dtype": "float32"})
    plan = make_plan(spec, lambda cell: None)
    assert [c.key for c in plan.cells[:3]] == [
        "profile/scan/",
        "profile/probe/reviews",
        "profile/probe/sst2",
    ]
    scan, _, probe = (c.job(spec) for c in plan.profiles)
    assert (scan.kind, scan.dtype, probe.kind) == ("scan", "float32", "probe")
    assert isinstance(probe, ProbeJob)
    assert (probe.task, probe.dtype, probe.seed) == ("sst2", "float32", spec.search_seed)
    assert not make_plan(spec_of(), lambda cell: None).profiles
    assert len(make_plan(spec_of(profiles=True), lambda cell: None).profiles) == 2


@pytest.mark.parametrize("name", PRESETS)
def test_a_spec_as_yaml_is_the_same_spec(name: str) -> None:
    over = {"lr_factors": [0.1, 1], "data_dir": "/data of mine", "eps": 1e-4}
    spec = make_spec(read_fields(name), over)
    assert make_spec(parse_fields(as_yaml(spec), "it"), {}) == spec


def test_places_are_absolute_and_hold_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no sst2/train.jsonl"):
        placed(spec_of(tasks=["sst2"], data_dir="here"))
    with pytest.raises(UserError, match="'nothing' is unknown"):
        placed(spec_of(tasks=["nothing"]))
    with pytest.raises(UserError, match="Layer 16 is out of range"):
        placed(spec_of(**arm(scope="layer:16")))
    (tmp_path / "here/sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        (tmp_path / f"here/sst2/{split}.jsonl").touch()
    found = placed(spec_of(tasks=["sst2"], data_dir="here"))
    assert found.common["data_dir"] == str(tmp_path / "here")


@pytest.mark.parametrize(
    "text",
    [
        "title: 2020-13-45",
        "a: " + "[" * 3000,
        "steps: " + "9" * 5000,
        "common: [1]",
        "arms: [{name: x, scope: full, settings: 5}]\nsteps: 3",
        "a: &a [x]\ntitle: [*a, *a]",
    ],
    ids=["date", "deep", "digits", "common", "settings", "alias"],
)
def test_yaml_that_is_no_spec_is_a_sentence(text: str) -> None:
    """Whatever the parser chokes on; and aliases, of which a few lines can stand for gigabytes."""
    with pytest.raises(UserError) as caught:
        make_spec(parse_fields(text, "mine.yaml"), {})
    assert len(str(caught.value)) < 6000


def test_a_grid_has_no_rate_twice() -> None:
    spec = spec_of(lr_factors=[1, 1.0000001])
    assert len(spec.grid(spec.arms[0])) == 1
