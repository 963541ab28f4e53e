"""Reports of mechanism runs and probes, and of a whole model; the commands that write them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from tests.unit.families import save
from tests.unit.planted import Plant, build
from tests.unit.stored_runs import finished_mechanism, finished_probe, finished_scan
from tests.unit.test_rooms import run_python
from tests.unit.test_scan_report import call
from zo_core import runs
from zo_core.errors import UserError
from zo_core.export import Section, html_page
from zo_core.jobs import MechanismJob, ProbeJob, command_line
from zo_core.plots import METRICS
from zo_core.plots.probe import intervals
from zo_core.reports.model import ModelRuns, model_report
from zo_core.reports.run import run_report
from zo_core.runs import Run
from zo_core.settings import settings


@dataclass(frozen=True)
class Store:
    """A run store with runs of a small model, in which layer 2 writes massive activations."""

    folder: Path
    model: str
    scan: Run
    mechanism: Run
    probe: Run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A scan, a mechanism run and a probe with every further analysis."""
    folder = tmp_path_factory.mktemp("store")
    model = str(save(build("llama", Plant(layer=2, token=77, channel=9)), folder / "planted"))
    probe = {"draws": 2, "batch_size": 2, "batches": 2, "layers": [0, 2, 5]}
    further = {"eps_sweep": "1e-4,1e-3,1e-2", "scalings": "count,output"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings(), "cache_dir", folder)
        yield Store(
            folder,
            model,
            finished_scan(model=model, sequences=2, max_tokens=32),
            finished_mechanism(model=model, sequences=2, max_tokens=32),
            finished_probe(model=model, **probe, **further),
        )


@cache
def report_of(run: Run) -> bytes:
    """The report of a run that stays as it is, made once."""
    return run_report(run)


@cache
def report_of_model(model: str) -> bytes:
    """The report of a model, made once; tests remove what they add to the store."""
    return model_report(ModelRuns.find(model))


def headings(page: str) -> list[str]:
    return re.findall(r"<h[23]>([^<]*)", page)


# -- a run ---------------------------------------------------------------------------------------


def test_report_of_a_mechanism_run(store: Store) -> None:
    page = report_of(store.mechanism).decode()
    sites = pd.read_parquet(store.mechanism.result("sites.parquet"))
    part = {"mlp": "MLP", "attention": "attention"}[sites.loc[0, "writer"]]
    assert f"The {part} of layer {sites.loc[0, 'writer_layer']:.0f} writes the " in page
    for channel in sites["channel"]:
        assert f"<h3>Residual stream in channel {channel}" not in page, "one run: no parts"
        assert f"<h2>Residual stream in channel {channel}" in page
    for heading in ("What attends to it", "What it is for", "Settings", "Versions and hardware"):
        assert f"<h2>{heading}" in page
    assert command_line(store.mechanism.job).replace("'", "&#x27;") in page
    assert "packages.torch" in page
    assert page.count("plotly.js v") == 1
    # The stream of every channel, sinks and interventions, and neurons of MLPs.
    neurons = pd.read_parquet(store.mechanism.result("neurons.parquet"))
    figures = len(sites) + 2 + len(neurons[["site", "role"]].drop_duplicates())
    assert page.count("Plotly.newPlot(") == figures


def test_report_of_a_probe(store: Store) -> None:
    page = report_of(store.probe).decode()
    summary = store.probe.result_json()
    assert summary is not None
    assert f"Layer {summary['most_sensitive_layer']} has the largest mean |g| of the 3" in page
    for heading in ("Distribution", "Propagation", "Place or", "Range of eps", "Loss shift with"):
        assert f"<h2>{heading}" in page
    assert "ecommended" in page
    layers = pd.read_parquet(store.probe.result("layers.parquet"))
    main = layers[layers["metric"] == "abs_projected_gradient"].set_index("layer")["mean"]
    for layer in (0, 2, 5):
        assert f"<tr><td>{layer}</td><td>2</td><td>{main[layer]:.4g}</td>" in page
    assert command_line(store.probe.job).replace("'", "&#x27;") in page
    # Metrics, two scalings, distribution, two of propagation, place, eps.
    assert page.count("Plotly.newPlot(") == len(METRICS) + 2 + 1 + 2 + 1 + 1


def test_a_part_of_a_run_says_so_and_a_live_run_has_no_report(store: Store) -> None:
    cut = runs.create(store.probe.job, None)
    with pytest.raises(UserError, match="is queued: wait until it has ended"):
        run_report(cut)
    cut.update(state="cancelled")
    with pytest.raises(UserError, match="ended before its first layer: run it again"):
        run_report(cut)
    cut.write_result("layers.parquet", store.probe.result("layers.parquet").read_bytes())
    page = run_report(cut).decode()
    assert "It was cancelled: this is what it had measured until then." in page
    assert "Propagation" not in headings(page)
    cut.write_result("draws.parquet", b"torn")
    with pytest.raises(UserError, match=f"table draws of {cut.run_id} cannot be read"):
        run_report(cut)
    early = runs.create(store.mechanism.job, None)
    with pytest.raises(UserError, match="is queued: wait until it has ended"):
        run_report(early)
    early.update(state="cancelled")
    with pytest.raises(UserError, match="ended before its first table: run it again"):
        run_report(early)


def test_intervals_of_what_cannot_be_negative_end_at_zero() -> None:
    row = {"layer": 0, "mean": 1.0, "sd": 2.0, "se": 1.0, "n": 4}
    table = pd.DataFrame([row | {"metric": metric} for metric in METRICS])
    low = {metric: intervals(table, metric)["low"].item() for metric in METRICS}
    assert [metric for metric, value in low.items() if value < 0] == ["projected_gradient"]


# -- a model -------------------------------------------------------------------------------------


def test_report_of_a_model_holds_the_newest_finished_run_of_each_kind(store: Store) -> None:
    newer = runs.create(store.probe.job, None)
    newer.update(state="failed", error="no")
    other = runs.create(ProbeJob(model="demo"), None)
    other.update(state="done")
    found = ModelRuns.find(store.model)
    named = {kind: run and run.run_id for kind, run in found.runs.items()}
    assert named == {
        "scan": store.scan.run_id,
        "mechanism": store.mechanism.run_id,
        "probe": store.probe.run_id,
    }
    page = report_of_model(store.model).decode()
    for part in ("Activation scan", "Mechanism", "Sensitivity"):
        assert re.search(rf'<a href="#part-\d">{part}</a>', page)
    for run in (store.scan, store.mechanism, store.probe):
        own = report_of(run).decode()
        # All that the report of the run says, one level down.
        assert set(headings(own)) <= set(headings(page))
        assert command_line(run.job).replace("'", "&#x27;") in page
    counts = [report_of(r).count(b"Plotly.newPlot(") for r in found.runs.values() if r]
    assert page.count("Plotly.newPlot(") == sum(counts)
    assert page.count("plotly.js v") == 1, "plotly is inside, once"
    assert 'src="http' not in page
    ids = re.findall(r'<div id="(figure-\d+)"', page)
    assert len(ids) == len(set(ids)) == page.count("Plotly.newPlot(")
    newer.delete()
    other.delete()


def test_a_revision_is_another_model_and_a_dtype_is_not(store: Store) -> None:
    main = runs.create(store.scan.job.model_copy(update={"revision": "v2"}), None)
    main.update(state="done")
    half = runs.create(store.scan.job.model_copy(update={"dtype": "bfloat16"}), None)
    half.update(state="done")
    assert ModelRuns.find(store.model).runs["scan"].run_id == half.run_id  # type: ignore[union-attr]
    revised = ModelRuns.find(store.model, "v2")
    assert revised.runs["scan"].run_id == main.run_id  # type: ignore[union-attr]
    assert revised.runs["probe"] is None
    page = model_report(revised).decode()
    assert f"Model {store.model}@v2" in page
    for job in (MechanismJob, ProbeJob):
        assert command_line(job(model=store.model, revision="v2")) in page
    assert "cannot be read" in page, "the scan has no tables: that is said in its place"
    main.delete()
    half.delete()


def test_report_commands(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in (store.mechanism, store.probe):
        done = call("report", run.run_id, "--out", "run.html")
        assert done.exit_code == 0, done.output
        assert Path("run.html").read_bytes() == report_of(run)
    # A folder by its relative path is the model of runs that have it whole.
    monkeypatch.chdir(Path(store.model).parent)
    out = tmp_path / "model.html"
    done = call("report", "--model", "./planted", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["model"], answer["revision"]) == (store.model, None)
    assert answer["runs"]["probe"] == store.probe.run_id
    assert answer["bytes"] == out.stat().st_size
    assert out.read_bytes() == report_of_model(store.model)
    for arguments, sentence in (
        ((), "Give either RUN or --model"),
        ((store.scan.run_id, "--model", "demo"), "Give either RUN or --model"),
        ((store.scan.run_id, "--revision", "x"), "--revision goes with --model"),
        (("--model", "demo"), "no scan, mechanism run or probe of demo in this run store has"),
        (("--model", ""), "model is '': string should have"),
        (("--model", " "), "give demo, an existing folder"),
    ):
        refused = call("report", *arguments)
        assert refused.exit_code == 2, refused.output
        assert sentence in refused.output.replace("\n", " ")


def test_sections_of_sections_are_linked() -> None:
    figure = go.Figure()
    inner = Section("In <it>", ["text", figure])
    page = html_page("T", [Section("", ["top", figure]), Section("Part", [inner, figure])]).decode()
    assert '<nav><a href="#part-1">Part</a></nav>' in page
    assert page.index('<section class="part" id="part-1">') < page.index("<h2>Part</h2>")
    assert page.index("<h2>Part</h2>") < page.index("<h3>In &lt;it&gt;</h3>")
    assert page.count("plotly.js v") == 1
    assert "<nav>" not in html_page("T", [Section("Alone", ["text"])]).decode()


# -- the pages -----------------------------------------------------------------------------------


def test_pages_offer_every_table_and_figure(store: Store) -> None:
    """The same section on all three pages; a table and a figure are chosen from lists."""
    code = f"""
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60).run()
        for page, run in (
            ("outliers", {store.scan.run_id!r}),
            ("mechanism", {store.mechanism.run_id!r}),
            ("sensitivity", {store.probe.run_id!r}),
        ):
            app.query_params["run"] = run
            app.switch_page(f"pages/{{page}}.py").run()
            assert not app.exception, app.exception
            tables = app.selectbox(key="export_table")
            figures = app.selectbox(key="export_figure")
            buttons = [b.proto for b in app.get("download_button")]
            print(page, len(tables.options), len(figures.options))
            print(*(b.label for b in buttons), any(b.disabled for b in buttons))
    """
    lines = run_python(code, store.folder).strip().splitlines()
    assert lines[0].split()[:2] == ["outliers", "7"]
    assert lines[2].split()[:2] == ["mechanism", "5"]
    assert lines[4].split() == ["sensitivity", "10", "5"]
    for line in lines[1::2]:
        assert line.startswith("CSV Parquet HTML ")
        assert line.endswith("Report (HTML) Whole model (HTML) summary.json Raw run (zip) False")


@pytest.mark.parametrize(
    "useless", [{"dtype": "bfloat16", "eps": 1e-8}, {"dtype": "float16", "eps": 10.0}]
)
def test_a_probe_without_usable_numbers_has_a_report(
    store: Store, useless: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moved, or nothing is finite: the report, and the model's, say so."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    fields = {"draws": 2, "batch_size": 2, "layers": [2, 3], "scalings": "output"}
    probe = finished_probe(model=store.model, **fields, **useless)
    assert probe.status().state == "done"
    draws = pd.read_parquet(probe.result("draws.parquet"))["value"]
    assert draws.isna().any() or (draws == 0).any()
    said = "No loss shift is finite and above 0"
    assert said in run_report(probe).decode()
    assert said in model_report(ModelRuns.find(store.model, None)).decode()
