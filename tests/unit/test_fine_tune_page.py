"""The fine-tune form: simple at first, every setting under Advanced, and its command line."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.unit.test_rooms import run_python
from zo_core import runs
from zo_core.artifacts.raw import Stored, build_header
from zo_core.jobs import TuneJob
from zo_core.plots import loss_curve
from zo_core.runs import Process
from zo_core.settings import settings


def test_advanced_settings_and_other_scopes(tmp_path: Path) -> None:
    """What is chosen shows in the command line; what does not fit is one sentence."""
    code = """
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60).run()
        app.switch_page("pages/fine_tune.py").run()
        print(app.code[0].value)
        app.segmented_control(key="tune_scope").set_value("other").run()
        print(app.code[0].value)
        app.text_input(key="tune_scope_text").set_value("channels:auto:top1%").run()
        app.selectbox(key="tune_optimizer").set_value("momentum").run()
        app.number_input(key="tune_momentum").set_value(0.5).run()
        app.number_input(key="tune_directions").set_value(4).run()
        app.selectbox(key="tune_noise").set_value("sphere").run()
        print(app.code[0].value)
        app.selectbox(key="tune_keep").set_value("last").run()
        app.number_input(key="tune_patience").set_value(3).run()
        app.multiselect(key="tune_track").set_value(["wandb", "tensorboard"]).run()
        print(app.code[0].value)
        app.selectbox(key="tune_optimizer").set_value("adamw").run()
        print(app.code[0].value)
        app.text_input(key="tune_scope_text").set_value("layer:99").run()
        print(app.warning[0].value)
        app.text_input(key="tune_scope_text").set_value("layers").run()
        print(app.warning[0].value)
        app.text_input(key="tune_scope_text").set_value("prefix").run()
        app.selectbox(key="tune_path").set_value("fast").run()
        print(app.warning[0].value)
        app.selectbox(key="tune_path").set_value("reference").run()
        print(next(c.value for c in app.caption if "Memory:" in c.value))
        assert not app.exception, app.exception
    """
    lines = run_python(code, tmp_path).strip().splitlines()
    start = "python -m zo_core tune --model demo"
    assert lines[0] == start
    assert lines[1] == f"{start} --scope attention:auto"
    momentum = "--optimizer momentum --momentum 0.5 --directions 4"
    assert lines[2] == f"{start} --noise sphere --scope channels:auto:top1% {momentum}"
    kept = "--keep last --patience 3 --track tensorboard,wandb"
    assert lines[3] == f"{lines[2]} {kept}"
    assert lines[4] == f"{start} --scope channels:auto:top1% --optimizer adamw {kept}"
    assert "there is no layer 99" in lines[5]
    assert "choose full" in lines[6]
    assert "path fast is not possible" in lines[7]
    assert "fp32 master" in lines[8]


def test_an_ended_run_offers_its_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors and ledger directly, folders as commands and, being small, as archives."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    run = runs.create(TuneJob(scope="lora:3", steps=2), None)
    entry = Stored("F32", (2,), 0, 8)
    head = build_header({"step": "1"}, {"a.lora_A.default.weight": entry})
    (run.path / "checkpoint.safetensors").write_bytes(head + bytes(8))
    step = {"kind": "step", "step": 1, "loss": 1.0, "g": [1.0], "lr": 1e-3, "seconds": 1.0}
    run.append_metrics(step | {"forward_passes": 2})
    run.update(state="cancelled", step=1, total=2)
    code = f"""
        import sys
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60)
        app.query_params["run"] = {run.run_id!r}
        app.run()
        app.switch_page("pages/fine_tune.py").run()
        assert not app.exception, app.exception
        print([c.value for c in app.code if " export " in c.value])
        print([b.key for b in app.button if b.key.startswith("make_")])
        print([b.proto.label for b in app.get("download_button")])
        print([c.value for c in app.caption if "step 1 of 2, cancelled" in c.value] != [])
        print("torch" in sys.modules)
    """
    lines = run_python(code, tmp_path).strip().splitlines()
    command = f"python -m zo_core export {run.run_id} --form"
    assert lines[0] == str(
        [f"{command} {form} --out {run.run_id}-{form}" for form in ("model", "adapter")]
    )
    assert lines[1] == "['make_model', 'make_adapter']"
    assert lines[2] == "['metrics.csv', 'Tuned tensors', 'Ledger', 'Figure (HTML)']"
    assert lines[3:] == ["True", "False"]


def test_dev_points_best_step_and_early_stop_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    job = TuneJob(scope="layer:3", steps=100, eval_every=2, patience=1)
    run = runs.create(job, Process.current())
    outcome = {"kind": "eval", "examples": 8}
    run.append_metrics(outcome | {"step": 0, "split": "validation", "accuracy": 0.5, "loss": 0.7})
    for n in range(1, 5):
        step = {"kind": "step", "step": n, "loss": 0.7, "seconds": 1.0 * n, "forward_passes": 2 * n}
        run.append_metrics(step)
    for n, loss in ((0, 0.7), (2, 0.55), (4, 0.6)):
        run.append_metrics(outcome | {"step": n, "split": "dev", "accuracy": 0.5, "loss": loss})
    before, after = {"accuracy": 0.5, "loss": 0.7}, {"accuracy": 0.625, "loss": 0.6}
    run.append_metrics(outcome | {"step": 2, "split": "validation"} | after)
    summary = {"before": before, "after": after, "best_step": 2, "kept": "best", "lr": 1e-3}
    run.write_result("summary.json", json.dumps(summary | {"stopped_early_at": 4, "steps": 4}))
    head = build_header({"step": "2"}, {"w": Stored("F32", (2,), 0, 8)})
    for name in ("best", "checkpoint"):
        (run.path / f"{name}.safetensors").write_bytes(head + bytes(8))
    run.update(state="done", step=4, total=100)
    code = f"""
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60)
        app.query_params["run"] = {run.run_id!r}
        app.run()
        app.switch_page("pages/fine_tune.py")
        app.query_params["run"] = {run.run_id!r}
        app.run()
        print(app.metric[0].value)
        print(next(c.value for c in app.caption if "stopped early" in c.value))
        print([b.proto.label for b in app.get("download_button")])
        print([*app.exception])
    """
    lines = run_python(code, tmp_path).replace("\\", "").strip().splitlines()
    assert lines[0] == "50.0 % → 62.5 %"
    assert "stopped early at step 4 of 100" in lines[1]
    assert "best dev loss 0.55 at step 2, whose weights are kept" in lines[1]
    assert "Tuned tensors" in lines[2]
    assert lines[3] == "[]"


def test_chart_draws_dev_evaluations_and_marks_the_best() -> None:
    steps = pd.DataFrame(
        {"step": [1, 2, 3, 4], "loss": 1.0, "forward_passes": [2, 4, 6, 8], "seconds": 1.0}
    )
    evals = pd.DataFrame({"step": [0, 2], "accuracy": [0.5, 0.75], "loss": [0.7, 0.6]})
    dev = pd.DataFrame({"step": [0, 2, 4], "accuracy": 0.5, "loss": [0.7, 0.5, 0.6]})
    figure = loss_curve(steps, evals, "forward_passes", dev=dev, best=2)
    drawn = {trace.name: trace for trace in figure.data}
    assert list(drawn["dev loss"].x) == list(drawn["dev accuracy"].x) == [0, 4, 8]
    assert list(drawn["dev loss"].y) == [0.7, 0.5, 0.6]
    assert list(drawn["validation accuracy"].y) == [50.0, 75.0]
    assert all(shape.x0 == 4 for shape in figure.layout.shapes)
    assert "best dev loss: step 2" in str(figure.layout.annotations)
    loss_curve(steps, pd.DataFrame())
