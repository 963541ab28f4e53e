"""Pages with tasks on them: a preview's marks, and F1 where accuracy would stand."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.unit.task_rows import write_tasks
from tests.unit.test_rooms import run_python
from zo_core import runs
from zo_core.jobs import PreviewJob, TuneJob
from zo_core.plots import loss_curve
from zo_core.progress import JobContext
from zo_core.recipes.preview import run_preview
from zo_core.runs import Process, Run
from zo_core.settings import settings


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run store of its own."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path / "cache")
    return tmp_path


def f1_run() -> Run:
    """A finished run on SQuAD, as the recipe leaves it."""
    job = TuneJob(task="squad", scope="layer:3", steps=2, lr=1e-6)
    run = runs.create(job, Process.current())
    outcomes = [{"f1": f1, "em": 0.125, "loss": 2.5, "examples": 8} for f1 in (0.25, 0.375)]
    step = {"kind": "step", "loss": 2.0, "seconds": 1.0, "g": [0.1], "lr": 1e-6}
    run.append_metrics({"kind": "eval", "step": 0, "split": "validation", **outcomes[0]})
    for n in (1, 2):
        run.append_metrics(step | {"step": n, "forward_passes": 2 * n})
    run.append_metrics({"kind": "eval", "step": 2, "split": "validation", **outcomes[1]})
    summary = {"before": outcomes[0], "after": outcomes[1], "metric": "f1", "layer": 3, "lr": 1e-6}
    run.write_result("summary.json", json.dumps(summary))
    cut = {"train": 2, "validation": 1}
    run.update(state="done", step=2, total=2, details={"truncated": cut})
    return run


def test_f1_stands_where_accuracy_would(store: Path) -> None:
    run = f1_run()
    code = f"""
        import json
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60)
        app.query_params["run"] = {run.run_id!r}
        app.run()
        app.switch_page("pages/fine_tune.py")
        app.query_params["run"] = {run.run_id!r}
        app.run()
        print([(m.label, m.value, m.delta) for m in app.metric][:2])
        print(any("3 rows cut on the left" in c.value for c in app.caption))
        print([*app.exception])
        app.switch_page("pages/runs.py").run()
        print("F1 25.0 % → 37.5 %" in str(app.dataframe[0].value["Result"].tolist()))
    """
    lines = run_python(code, store / "cache").strip().splitlines()
    assert lines[0].startswith(
        "[('Validation F1', '25.0 % → 37.5 %', '+12.5 points'), ('Validation"
    )
    assert lines[1:] == ["True", "[]", "True"]


def test_chart_draws_the_main_metric() -> None:
    steps = pd.DataFrame({"step": [1, 2], "loss": 1.0, "forward_passes": [2, 4], "seconds": 1.0})
    evals = pd.DataFrame({"step": [0, 2], "f1": [0.25, 0.375], "em": 0.0, "loss": 2.0})
    figure = loss_curve(steps, evals, metric="f1")
    drawn = {trace.name: trace for trace in figure.data}
    assert list(drawn["validation F1"].y) == [25.0, 37.5]
    assert "accuracy" not in str(figure)


def test_preview_is_shown_with_its_marks(store: Path) -> None:
    data = write_tasks(store / "data", train=20, validation=6)
    job = PreviewJob(task="copa", data_dir=data, dev_examples=4)
    run = runs.create(job, Process.current())
    run_preview(job, run, JobContext(run))
    run.update(state="done")
    code = f"""
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60).run()
        app.switch_page("pages/fine_tune.py")
        app.session_state["tune_preview_run"] = {run.run_id!r}
        app.run()
        shown = [e.proto.body for e in app.get("html")]
        marked = [s for s in shown if "<mark>" in s]
        print(len(marked), all("The cup fell so" in s or "I ran home!" in s for s in marked))
        print(all(s.count("✓") == 1 for s in marked), [*app.exception])
        print(any("16 train, 4 dev, 6 validation" in c.value for c in app.caption))
    """
    lines = run_python(code, store / "cache").strip().splitlines()
    assert lines == ["5 True", "True []", "True"]
