"""The compare page over folders in every state: form, cells, verdict, exports; nothing computed."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from pages.parts.compare_live import cells_html
from tests.unit.test_rooms import reached_from, run_python
from zo_core import runs
from zo_core.compare import store
from zo_core.compare.cells import Cell
from zo_core.compare.claims import CLAIMS
from zo_core.compare.detach import start_driver
from zo_core.compare.reader import Facts
from zo_core.compare.results import Results
from zo_core.compare.simulate import results_of, simulated, spec_of
from zo_core.compare.status import SessionStatus, State
from zo_core.compare.store import Comparison
from zo_core.compare.tables import as_dict, write_tables
from zo_core.errors import UserError
from zo_core.export import parquet_bytes
from zo_core.jobs import TuneJob
from zo_core.reports.compare import comparison_report
from zo_core.runs import Process, to_json
from zo_core.settings import ROOT, settings

LAYER = 3


def folder(results: Results, state: State = "done", process: Process | None = None) -> Comparison:
    """A comparison whose results are these."""
    made = store.create(results.spec, "python -m zo_core compare it.yaml")
    facts = as_dict(made, results)
    layers = range(16)
    facts["activation"] = [{"layer": k, "top1": 10.0 + k, "median": 1.0} for k in layers]
    facts["sensitivity"] = [
        {
            "task": task,
            "layer": k,
            "metric": "abs_projected_gradient",
            "mean": 1.0 + k,
            "sd": 0.1,
            "se": 0.05,
            "n": 4,
        }
        for task in results.spec.tasks
        for k in layers
    ]
    write_tables(made, facts)
    curves = [
        {"task": t, "arm": a.name, "seed": s, "forward_passes": 2.0 * i, "loss": 1.0 - 0.1 * i}
        for t in results.spec.tasks
        for a in results.spec.arms
        for s in results.spec.seeds
        for i in range(1, 4)
    ]
    made.write("curves.parquet", parquet_bytes(pd.DataFrame(curves)))
    cells = [
        {
            "task": m.task,
            "arm": m.arm,
            "seed": m.seed,
            "lr": 1e-3,
            "state": "done",
            "share": 1.0,
            "run_id": m.run_id,
            "error": "",
            "value": m.value,
            "dev_loss": 0.5,
        }
        for m in results.measurements
    ]
    cells[0] |= {"state": "running", "share": 0.42, "value": None}
    cells[1] |= {"state": "failed", "error": "<b>fire</b>", "value": None}
    made.write(
        "progress.json", to_json({"profiles": [], "search": [], "final": cells, "choices": []})
    )
    now = time.time()
    made.update(
        SessionStatus(
            state, "", "last", process, now - 90, now, now, total=len(cells), done=7, eta=61.0
        )
    )
    return made


def measured(seeds: int = 3, tasks: int = 1) -> Results:
    """A simulated comparison in which layers have gains."""
    results = simulated(spec_of(seeds, tasks), {"layer:auto": 0.05, "layer:1": 0.02}, 0)
    whole = []
    for m in results.measurements:
        scope = results.spec.arm(m.arm).scope.replace("auto", str(LAYER))
        layer = int(scope.partition(":")[2]) if scope.startswith("layer:") else None
        whole.append(replace(m, before=0.5, resolved_scope=scope, layer=layer, metric="accuracy"))
    return replace(results, measurements=whole)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    return tmp_path


OPEN = """
    import sys
    from streamlit.testing.v1 import AppTest
    def open_page(**query):
        app = AppTest.from_file("app.py", default_timeout=60)
        app.run()
        app.switch_page("pages/compare.py")
        app.query_params.update(query)
        return app.run()
    def texts(kind):
        return " | ".join(str(e.value) for e in kind).replace("\\\\", "")
"""


def test_the_form_says_what_it_will_run_and_what_is_wrong(cache: Path) -> None:
    code = f"""{OPEN}
    app = open_page()
    print(texts(app.info))
    print(app.code[-1].value)
    print(texts(app.caption))
    app.text_input(key="compare_quick_seeds").set_value("0-2, 9").run()
    app.number_input(key="compare_quick_steps").set_value(7).run()
    app.text_input(key="compare_quick_factors").set_value("0.1,1").run()
    print(app.code[-1].value)
    app.text_input(key="compare_quick_seeds").set_value("0,x").run()
    print(texts(app.warning))
    app.text_input(key="compare_quick_seeds").set_value("").run()
    print(texts(app.warning))
    app.segmented_control(key="compare_source").set_value("falsify").run()
    app.multiselect(key="compare_falsify_tasks").set_value([]).run()
    print(texts(app.warning))
    app.segmented_control(key="compare_source").set_value("yaml").run()
    print(app.code[-1].value)
    app.text_area(key="compare_yaml").set_value("steps: 3").run()
    app.button(key="start_comparison").click().run()
    print(texts(app.error))
    print([*app.exception], sorted({{"scipy", "torch", "transformers"}} & set(sys.modules)))
    """
    lines = run_python(code, cache).strip().splitlines()
    assert "No comparison yet" in lines[0]
    assert lines[1] == "python -m zo_core compare quick"
    assert (
        "24 runs of 80 forward passes. 6 units (task x seed): the smallest p is 0.0156" in lines[2]
    )
    assert lines[3] == (
        "python -m zo_core compare quick --steps 7 --seeds 0,1,2,9 --set lr_factors=0.1,1"
    )
    assert "seeds is 'x': input should be a valid integer" in lines[4]
    assert "seeds is empty: give at least one" in lines[5]
    assert "tasks is []: list should have at least 1 item" in lines[6]
    assert lines[7] == "python -m zo_core compare spec.yaml"
    assert "arms" in lines[8]
    assert lines[9] == "[] []", "the page is light"
    assert not (cache / "comparisons").exists()


def test_a_finished_comparison_shows_verdict_tables_and_downloads(cache: Path) -> None:
    made = folder(measured(8, 2))
    code = f"""{OPEN}
    app = open_page(comparison={made.comparison_id!r})
    print([h.value for h in app.header])
    print(texts(app.markdown))
    print([b.proto.label for b in app.get("download_button")])
    print([e.key for e in app.button if "comparison" in e.key])
    app.segmented_control(key="compare_task").set_value("sst2").run()
    print([*app.exception], sorted({{"scipy", "torch"}} & set(sys.modules)))
    """
    lines = run_python(code, cache).strip().splitlines()
    assert lines[0] == ("['Verdict', 'Arms', 'Gain by layer', 'Learning rates', 'Export']")
    for key, claim in CLAIMS.items():
        assert f"({key}) {claim.text}" in lines[1]
    assert ":green-badge[:material/check_circle: holds]" in lines[1]
    assert "Report (HTML)" in lines[2]
    assert "table.parquet" in lines[2]
    assert lines[3] == "['start_comparison']", "nothing to cancel or resume"
    assert lines[4] == "[] []"


STATES: list[tuple[State, bool, str, str]] = [
    ("running", True, "cancel_comparison", "7 of 27 cells done"),
    ("running", False, "resume_comparison", "Interrupted after 7 of 27 cells"),
    ("cancelled", False, "resume_comparison", "Cancelled after 7 of 27 cells"),
    ("failed", False, "resume_comparison", "The disk is full."),
    ("done", False, "resume_comparison", "7 of 27 cells done, 2 failed, 1 diverged"),
    ("done", False, "start_comparison", "7 of 27 cells done, 1 diverged"),
    ("done", False, "resume_comparison", "7 of 27 cells done, 2 failed or diverged"),
]


def test_states(cache: Path) -> None:
    """What each state says and offers; an unknown one is a sentence."""
    gone = Process(Process.current().host, 2**22 + 1, 0.0)
    made = [
        folder(measured(), state, Process.current() if alive else gone)
        for state, alive, _, _ in STATES
    ]
    made[3].update(replace(made[3].status(), error="The disk is full."))
    made[4].update(replace(made[4].status(), failed=2, diverged=1))
    made[5].update(replace(made[5].status(), diverged=1))
    made[6].update(replace(made[6].status(), failed=2))  # of a version that counted both as one
    names = [c.comparison_id for c in made]
    code = f"""{OPEN}
    for name in [*{names!r}, "../../etc"]:
        app = open_page(comparison=name)
        shown = [p.proto.text for p in app.get("progress")]
        print([e.key for e in app.button], texts(app.warning), texts(app.error), shown,
              texts(app.caption))
    print([*app.exception])
    """
    lines = run_python(code, cache).replace("\\", "").strip().splitlines()
    for (_, _, button, words), line in zip(STATES, lines, strict=False):
        assert button in line
        assert words in line
    assert "resume_comparison" not in lines[5], "what diverged would diverge again"
    assert "There is no comparison ../../etc" in lines[7]
    assert lines[8] == "[]"


def test_nobody_starts_a_second_driver(cache: Path) -> None:
    with pytest.raises(UserError, match="is running already"):
        start_driver(folder(measured(), "running", Process.current()))


def test_cells_are_safe_html_and_know_when_nobody_runs_them(cache: Path) -> None:
    made = folder(measured())
    progress = made.read_json("progress.json")
    assert progress is not None
    live, dead = (cells_html(made.spec, progress, alive) for alive in (True, False))
    assert "42 %" in live
    assert "42 %" not in dead
    assert "&lt;b&gt;fire" in live
    assert "<b>fire" not in live
    assert live.count("fine_tune?run=") == 27


def test_the_report_is_one_file_with_everything(cache: Path) -> None:
    made = folder(measured(8, 2))
    page = comparison_report(made).decode()
    assert "<script src" not in page
    figures = ["differences and curves"] * 2 * 2 + ["differences of all"] + ["sweep"] * 3
    assert page.count("Plotly.newPlot") == len(figures)
    for words in ("holds", "all-but:auto", "spec.yaml", "scipy", "seeds: [0, 1, 2, 3, 4, 5, 6, 7]"):
        assert words in page
    made.write("table.json", '{"arms": []}')  # an earlier version's
    with pytest.raises(UserError, match="has no tables yet"):
        comparison_report(made)


def test_sweeps_hold_gain_activation_and_sensitivity(cache: Path) -> None:
    facts = Facts.read(folder(measured(3, 2)))
    assert facts is not None
    assert facts.tasks == facts.sweeps == ["reviews", "sst2", "all"]
    gains, activation, felt, dominant, full = facts.sweep("sst2")
    assert set(gains["layer"]) == set(range(6))
    assert (len(activation), len(felt), dominant) == (16, 16, LAYER)
    assert full == pytest.approx(facts.arms("sst2").set_index("arm")["mean"]["full"] - 0.5)
    assert len(facts.sweep("all")[2]) == 0, "|g| of tasks has no common scale"


def test_numbers_that_are_missing_survive_json(cache: Path) -> None:
    """Strict JSON whatever failed: a page or another program reads it."""
    made = folder(results_of(spec_of(2), lambda arm, i: None if i else float("nan")))
    text = (made.path / "table.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_importing_the_page_imports_no_statistics() -> None:
    reached = reached_from([ROOT / "pages/compare.py"])
    assert "zo_core.compare.presets" in reached
    assert "scipy" not in reached
    assert "zo_core.compare.stats" not in reached


def test_cells_are_left_to_the_comparison_s_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs of a comparison, of an earlier try too, are listed where they are asked for only."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    comparison = store.create(spec_of(1))
    made = [runs.create(TuneJob(seed=seed), None) for seed in range(3)]
    for run in made:
        run.update(state="cancelled", step=5, total=10)
    for run in made[1:]:  # the newest; the second fills the cell that the first did not
        comparison.record(Cell("sst2", "layer", 1e-3, 0, 10), run.run_id)
    code = """
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60).run()
        app.switch_page("pages/runs.py").run()
        print(list(app.dataframe[0].value["Run"]), "Comparison" in app.dataframe[0].value)
        app.toggle(key="filter_cells").set_value(True).run()
        print(sorted(app.dataframe[0].value["Run"]), list(app.dataframe[0].value["Comparison"]))
        app.switch_page("pages/fine_tune.py").run()
        print(app.query_params["run"])
        assert not app.exception, app.exception
    """
    first, both, shown = run_python(code, tmp_path).strip().splitlines()
    assert first == f"['{made[0].run_id}'] False"
    assert both.startswith(str(sorted(run.run_id for run in made)))
    assert both.count(comparison.comparison_id) == 2
    assert made[0].run_id in shown
