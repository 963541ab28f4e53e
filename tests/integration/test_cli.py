"""``python -m zo_core``: every command, its JSON, its files and its exit codes."""

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors import safe_open

from tests.integration.conftest import CommandLine
from zo_core import runs
from zo_core.analysis.outliers import RULES
from zo_core.analysis.sensitivity import METRICS
from zo_core.jobs import TuneJob, command_line
from zo_core.settings import settings

pytestmark = pytest.mark.timeout(240)
LAYERS = 16
SMALL = ("--eval-examples", 20, "--train-examples", 64, "--batch-size", 4)


@pytest.fixture(scope="module")
def scanned(cli: CommandLine) -> dict[str, Any]:
    """The answer to ``scan``, made once."""
    return cli("scan", "--model", "demo", "--sequences", 4, "--json").expect(0).json


@pytest.fixture(scope="module")
def tuned(cli: CommandLine) -> dict[str, Any]:
    """The answer to ``tune``, made once."""
    arguments = ("--model", "demo", "--task", "reviews", "--scope", "layer:auto", "--steps", 6)
    return cli("tune", *arguments, *SMALL, "--seed", 0, "--json").expect(0).json


def test_no_command_prints_a_help_to_act_on(cli: CommandLine) -> None:
    answer = cli().expect(0)
    for word in ("scan", "probe", "tune", "runs", "app", "python -m zo_core scan"):
        assert word in answer.out


def test_scan(cli: CommandLine, scanned: dict[str, Any]) -> None:
    assert scanned["n_layers"] == LAYERS
    assert len(scanned["top1"]) == len(scanned["median"]) == LAYERS
    assert all(a > b > 0 for a, b in zip(scanned["top1"], scanned["median"], strict=True))
    assert scanned["first_outlier_layer"].keys() == RULES.keys()
    layer = scanned["first_outlier_layer"]["emergence"]
    assert layer > 0, "the bundled model has an outlier layer above 0"
    assert scanned["top1"][layer] / scanned["median"][layer] >= 250
    layers = pd.read_parquet(cli.run(scanned["run_id"]).result("layers.parquet"))
    assert list(layers["layer"]) == list(range(-1, LAYERS))
    assert layers["top1"].tolist()[1:] == scanned["top1"]


def test_scan_of_a_prompt_in_words_and_csv(cli: CommandLine, tmp_path: Path) -> None:
    table = tmp_path / "layers.csv"
    prompt = "=1+1 was what the cell said; the harbour was quiet."
    answer = cli("scan", "--text", "prompt", "--prompt", prompt, "--csv", table).expect(0)
    for rule in RULES:
        assert rule in answer.out
    layers = pd.read_csv(table)
    assert list(layers["layer"]) == list(range(-1, LAYERS))


def test_csv_cells_are_no_formulas(cli: CommandLine, tmp_path: Path) -> None:
    table = tmp_path / "layers.csv"
    cli("scan", "--text", "prompt", "--prompt", "=" * 8, "--csv", table).expect(0)
    tokens = pd.read_csv(table)["top1_token"]
    assert not tokens.str.startswith(("=", "+", "-", "@")).any()


def test_probe(cli: CommandLine, tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    arguments = ("--model", "demo", "--draws", 3, "--layers", "14,3", "--batch-size", 4)
    answer = cli("probe", *arguments, "--csv", table, "--json").expect(0).json
    assert answer["layers"] == [3, 14]
    assert (answer["n_layers"], answer["draws"]) == (LAYERS, 3)
    assert answer["most_sensitive_layer"] in (3, 14)
    draws = pd.read_csv(table)
    assert list(draws.columns) == ["layer", "draw", "metric", "value"]
    assert len(draws) == 2 * 3 * len(METRICS)
    assert not draws["value"].isna().any()
    run = cli.run(answer["run_id"])
    pd.testing.assert_frame_equal(
        draws, pd.read_parquet(run.result("draws.parquet")), check_dtype=False, check_exact=True
    )
    wide = draws.pivot(index=["layer", "draw"], columns="metric", values="value")
    assert (wide["abs_projected_gradient"] == wide["projected_gradient"].abs()).all()
    assert (wide["output_kl"] > -1e-6).all()
    means = pd.read_csv(run.result("layers.csv")).set_index(["layer", "metric"])
    for key, group in draws.groupby(["layer", "metric"])["value"]:
        assert means.loc[key, "mean"] == pytest.approx(group.mean())
        assert means.loc[key, "se"] == pytest.approx(group.std() / math.sqrt(3))
        assert means.loc[key, "n"] == 3
    sidecar = json.loads((tmp_path / "out.provenance.json").read_text())
    assert sidecar["job"]["draws"] == 3
    assert sidecar["run_id"] == answer["run_id"]
    assert sidecar["base_loss"] == answer["base_loss"]
    for name in ("model", "dtype", "device", "packages", "python", "written"):
        assert sidecar[name]


def test_tune(cli: CommandLine, tuned: dict[str, Any], scanned: dict[str, Any]) -> None:
    wanted = ("run_id", "scope", "layer", "before", "after", "steps_per_second", "forward_passes")
    assert set(wanted) <= tuned.keys()
    assert (tuned["scope"], tuned["forward_passes"]) == ("layer:auto", 12)
    assert tuned["layer"] == scanned["first_outlier_layer"]["emergence"]
    assert tuned["steps_per_second"] > 0
    for outcome in (tuned["before"], tuned["after"]):
        assert 0 <= outcome["accuracy"] <= 1
        assert outcome["loss"] > 0
        assert outcome["examples"] == 20
    run = cli.run(tuned["run_id"])
    assert (run.path / "checkpoint.safetensors").is_file()
    records, _ = run.read_metrics()
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    evaluated = [(r["split"], r["step"]) for r in records if r["kind"] == "eval"]
    assert evaluated[:3] == [("validation", 0), ("dev", 0), ("dev", 6)]
    assert tuned["kept"] == "best"
    assert evaluated[3:] == ([("validation", 6)] if tuned["best_step"] else [])
    with safe_open(run.path / "best.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == tuned["best_step"]


def test_tune_in_words(cli: CommandLine) -> None:
    answer = cli("tune", "--scope", "layer:15", "--steps", 1, *SMALL).expect(0)
    assert "layer:15 (803328 parameters)  accuracy" in answer.out
    assert "2 forward passes" in answer.out
    assert re.search(r"best dev loss [\d.]+ at step [01] of 1; the best weights", answer.out)
    assert str(cli.cache / "runs") in answer.out


def test_runs_list_and_show(cli: CommandLine, tuned: dict[str, Any]) -> None:
    rows = cli("runs", "list", "--json").expect(0).json["runs"]
    ids = [row["run_id"] for row in rows]
    assert ids == sorted(ids, reverse=True)
    row = next(row for row in rows if row["run_id"] == tuned["run_id"])
    assert (row["kind"], row["state"], row["model"], row["task"]) == (
        "tune",
        "done",
        "demo",
        "reviews",
    )
    only = cli("runs", "list", "--kind", "tune", "--json").expect(0).json["runs"]
    assert {row["kind"] for row in only} == {"tune"}
    assert tuned["run_id"] in cli("runs", "list").expect(0).out

    shown = cli("runs", "show", tuned["run_id"], "--json").expect(0).json
    assert shown["job"] == cli.run(tuned["run_id"]).job.model_dump(mode="json")
    assert shown["status"]["state"] == "done"
    assert shown["result"]["after"] == tuned["after"]


def test_runs_export_and_delete(cli: CommandLine, tmp_path: Path) -> None:
    made = cli("tune", "--scope", "layer:15", "--steps", 1, *SMALL, "--json").expect(0).json
    target = tmp_path / "run.zip"
    cli("runs", "export", made["run_id"], "--out", target).expect(0)
    with zipfile.ZipFile(target) as archive:
        names = {n.removeprefix(f"{made['run_id']}/") for n in archive.namelist()}
    files = {"job.json", "status.json", "metrics.jsonl", "checkpoint.safetensors"}
    assert files | {"results/summary.json", "log.txt"} <= names
    assert cli("runs", "delete", made["run_id"]).expect(1), "not without asking"
    assert made["run_id"] in cli.ids()
    cli("runs", "delete", made["run_id"], "--yes").expect(0)
    assert made["run_id"] not in cli.ids()
    answer = cli("runs", "show", made["run_id"]).expect(2)
    assert f"No run '{made['run_id']}'" in answer.err


def test_equivalent_command_makes_the_same_job(cli: CommandLine) -> None:
    job = TuneJob(scope="layer:15", steps=1, train_examples=16, eval_examples=4, batch_size=2)
    words = command_line(job).split()[3:]
    made = cli(*words, "--json").expect(0).json
    assert cli.run(made["run_id"]).job == job


def test_refused_before_anything_starts(tmp_path: Path) -> None:
    """One bad input of those in tests/unit/test_cli_refusals.py, as a process of its own."""
    alone = CommandLine(tmp_path)
    answer = alone("tune", "--scope", "layer:99", "--json").expect(2)
    assert f"Error: {answer.json['error']}" in answer.err
    assert not (tmp_path / "engine").exists()
    assert "No runs yet" in alone("runs", "list").expect(0).out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("scan", "--bos", "add"), "this tokenizer has no BOS token"),
        (("scan", "--text", "prompt", "--prompt", "Hi"), "give at least 4"),
        (("tune", "--task", "sst2", "--data-dir", "/nowhere"), "/nowhere has no sst2/train.jsonl"),
    ],
)
def test_failed_job_exits_with_1_and_its_sentence(
    cli: CommandLine, arguments: tuple[object, ...], words: str
) -> None:
    answer = cli(*arguments, "--json").expect(1)
    assert answer.json["state"] == "failed"
    assert words in answer.json["error"]
    assert answer.json["error"] in " ".join(answer.err.split())
    assert "Unexpected" not in answer.json["error"]


def test_data_folder_of_other_tasks_leaves_the_bundled_one_alone(
    cli: CommandLine, tmp_path: Path
) -> None:
    beside = CommandLine(cli.cache, {"ZO_DATA_DIR": str(tmp_path)})
    beside("tune", "--task", "reviews", "--scope", "layer:15", "--steps", 1, *SMALL).expect(0)


def test_csv_into_a_folder_that_is_not_there_is_a_sentence(
    cli: CommandLine, tmp_path: Path
) -> None:
    arguments = ("--text", "prompt", "--prompt", "The harbour was quiet.")
    cli("scan", *arguments, "--csv", tmp_path / "no" / "table.csv").expect(2)


def test_export_into_a_folder_that_is_not_there_is_a_sentence(
    cli: CommandLine, scanned: dict[str, Any], tmp_path: Path
) -> None:
    cli("runs", "export", scanned["run_id"], "--out", tmp_path / "no" / "x.zip").expect(2)


def test_one_damaged_run_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example of a later version, whose job has a field more."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    good, damaged = (runs.create(TuneJob(), None) for _ in range(2))
    fields = json.loads((damaged.path / "job.json").read_text())
    (damaged.path / "job.json").write_text(json.dumps(fields | {"later": 1}))
    answer = CommandLine(tmp_path)("runs", "list", "--json").expect(0)
    assert good.run_id in [row["run_id"] for row in answer.json["runs"]]


def test_replay_agrees_or_exits_with_1(cli: CommandLine, tuned: dict[str, Any]) -> None:
    """The ledger rebuilds the checkpoint; once it is changed, it does not."""
    answer = cli("replay", tuned["run_id"], "--json").expect(0).json
    assert answer == {
        "run_id": tuned["run_id"],
        "steps": 6,
        "identical": True,
        "max_difference": 0.0,
        "device": answer["device"],
    }
    ledger = cli.run(tuned["run_id"]).path / "metrics.jsonl"
    kept = ledger.read_text()
    records = [json.loads(line) for line in kept.splitlines()]
    next(r for r in records if r["kind"] == "step")["g"][0] += 0.5
    try:
        ledger.write_text("".join(json.dumps(r) + "\n" for r in records))
        answer = cli("replay", tuned["run_id"], "--json").expect(1).json
        assert not answer["identical"]
        assert answer["max_difference"] > 0
    finally:
        ledger.write_text(kept)
    cli("replay", "no-run").expect(2)


def test_export_and_replay_of_the_exported_ledger(
    cli: CommandLine, tuned: dict[str, Any], tmp_path: Path
) -> None:
    """Words and JSON; the rebuilt tensors are the exported ones."""
    run, tensors, ledger = tuned["run_id"], tmp_path / "t.safetensors", tmp_path / "l.jsonl.gz"
    answer = cli("export", run, "--out", tensors, "--json").expect(0).json
    assert (answer["form"], answer["out"], answer["step"]) == ("tensors", str(tensors), 6)
    assert answer["bytes"] == tensors.stat().st_size
    words = cli("export", run, "--form", "ledger", "--out", ledger).expect(0).out
    assert f"{run}: ledger of step 6 of 6" in words
    assert str(ledger) in words
    rebuilt = tmp_path / "rebuilt.safetensors"
    again = cli("replay", "--ledger", ledger, "--out", rebuilt, "--json").expect(0).json
    assert (again["run_id"], again["identical"], again["out"]) == (run, True, str(rebuilt))
    bits = [p.read_bytes()[-answer["bytes"] // 2 :] for p in (tensors, rebuilt)]
    assert bits[0] == bits[1]

    for arguments, sentence in (
        (("export", run, "--form", "adapter"), "Choose one of: tensors, model, ledger"),
        (("export", run, "--form", "weights"), "'tensors', 'model', 'adapter' or 'ledger'"),
        (("export", run, "--out", tmp_path / "no" / "x"), "does not exist: make it first"),
        (("export", run, "--out", tmp_path), "is a folder: name a file for form tensors"),
        (("replay", "--ledger", tensors, "--out", rebuilt), "is no whole ledger of ZOScope"),
        (("replay",), "run is missing"),
    ):
        assert sentence in cli(*arguments, "--json").expect(2).json["error"]
