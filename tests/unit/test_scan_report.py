"""Reports, images and tables of a scan, and the commands that make them."""

import io
import json
import math
import struct
import xml.dom.minidom
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from typer.testing import CliRunner, Result

from tests.unit.families import save
from tests.unit.planted import Plant, build
from tests.unit.stored_runs import finished_scan
from tests.unit.test_rooms import run_python
from zo_core import cli, plots, runs
from zo_core.analysis.known import KnownModel, Published
from zo_core.analysis.outliers import RULES
from zo_core.cli import scans
from zo_core.errors import UserError
from zo_core.export import Code, Section, csv_bytes, html_page, parquet_bytes
from zo_core.jobs import TuneJob, command_line
from zo_core.reports import images
from zo_core.reports.run import run_report
from zo_core.runs import Run
from zo_core.settings import settings

PLANT = Plant(layer=2, token=77, channel=9)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run store of this module."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("store")
        patch.setattr(settings(), "cache_dir", folder)
        yield folder


@pytest.fixture(scope="module")
def scan(store: Path) -> Run:
    """A scan of the bundled model."""
    return finished_scan(sequences=4, max_tokens=48)


def call(*arguments: object) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# -- the report ----------------------------------------------------------------------------------


def test_report_holds_everything_and_needs_no_network(scan: Run) -> None:
    page = run_report(scan).decode()
    assert "The emergence rule names layer 3." in page
    for spec in RULES.values():
        assert spec.title in page
    for heading in ("Block output: magn", "Attention output", "MLP output", "Down-projection inp"):
        assert heading in page
    for heading in ("Layer by channel", "Layer by token", "OWL weighting", "Settings", "Versions"):
        assert f"<h2>{heading}" in page
    assert command_line(scan.job).replace("'", "&#x27;") in page
    assert "packages.torch" in page
    assert "device_name" in page
    assert page.count("Plotly.newPlot(") >= 12
    assert page.count("plotly.js v") == 1, "plotly is inside, once"
    assert 'src="http' not in page
    assert len(page) < 8e6


def test_report_takes_the_thresholds_of_the_page(scan: Run) -> None:
    page = run_report(scan, {"emergence": {"ratio": 1e6}}).decode()
    assert "The emergence rule names no layer." in page
    assert "ratio = 1e+06" in page


def test_report_of_what_is_no_finished_scan_is_a_sentence(store: Path, scan: Run) -> None:
    tune = runs.create(TuneJob(), None)
    with pytest.raises(
        UserError, match="of kind tune, which has no report: choose one of kind scan, mech"
    ):
        run_report(tune)
    live = runs.create(scan.job, None)
    with pytest.raises(UserError, match="is queued: a report needs a whole scan"):
        run_report(live)
    live.update(state="done")
    with pytest.raises(UserError, match="cannot be read"):
        run_report(live)


@pytest.fixture(scope="module")
def old(scan: Run) -> Run:
    """A scan of an earlier version: layers without quantiles, channels without counts, tokens."""
    run = runs.create(scan.job, None)
    run.update(state="done")
    layers = pd.read_parquet(scan.result("layers.parquet"))
    since = [
        c for c in layers if c.startswith(("q", "above", "kurt", "rms", "count", "nonfinite_"))
    ]
    run.write_result("layers.parquet", layers.drop(columns=since).to_parquet())
    run.write_result("tokens.parquet", scan.result("tokens.parquet").read_bytes())
    channels = pd.read_parquet(scan.result("channels.parquet"))
    channels = channels[channels["part"] == "block_output"].drop(columns=["part", "tokens6"])
    run.write_result("channels.parquet", channels.to_parquet())
    return run


def test_report_of_a_scan_of_an_earlier_version(old: Run) -> None:
    """It has layers, channels without counts, and tokens: a report of those."""
    page = run_report(old).decode()
    assert "The emergence rule names layer 3." in page
    assert "scan again" in page
    assert "Attention output" not in page


def test_report_command(scan: Run, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = call("report", scan.run_id, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == {"run_id": scan.run_id, "out": str(out), "bytes": out.stat().st_size}
    assert out.read_bytes() == run_report(scan)
    for arguments, sentence in (
        (("20200101-000000-scan-000000",), "no run"),
        ((scan.run_id, "--out", tmp_path / "no" / "x.html"), "does not exist"),
        ((scan.run_id, "--out", tmp_path), "is a folder"),
    ):
        refused = call("report", *arguments)
        assert refused.exit_code == 2
        assert sentence in refused.output.lower()


def test_pages_escape_what_they_show() -> None:
    evil = "<script>alert(1)</script>"
    table = pd.DataFrame({"<b>": [evil, None], "n": [0.123456789, float("nan")]})
    page = html_page(evil, [Section(evil, [evil, Code(evil), table])]).decode()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 6
    assert "<td>0.1235</td>" in page
    assert "<td></td><td></td>" in page
    assert "nan" not in page


def test_tables_come_back_from_csv_and_parquet(scan: Run) -> None:
    for name in ("layers", "parts", "channels", "tokens", "weights", "owl"):
        table = pd.read_parquet(scan.result(f"{name}.parquet"))
        again = pd.read_parquet(io.BytesIO(parquet_bytes(table)))
        pd.testing.assert_frame_equal(again, table)
        assert len(pd.read_csv(io.BytesIO(csv_bytes(table)), keep_default_na=False)) == len(table)


# -- layer by channel ----------------------------------------------------------------------------


def test_heatmap_of_a_part_with_layers_of_other_sizes() -> None:
    """Layer 1 has no such part and layer 2 fewer neurons: empty cells, every layer in its row."""
    sizes = {0: 5, 2: 2, 3: 5}
    table = pd.DataFrame(
        [
            {"layer": k, "part": "down_input", "channel": c, "magnitude": 10.0 * k + c + 1}
            for k, n in sizes.items()
            for c in range(n)
        ]
    )
    assert plots.top_channels(table, 3) == [4, 3, 2]
    figure = plots.channel_heatmap(table, shown=[4, 1], unit="neuron")
    cells, marks = figure.data
    assert list(cells.y) == [0, 1, 2, 3]
    there = [[not math.isnan(v) for v in row] for row in cells.z]
    assert there == [[True, True], [False, False], [False, True], [True, True]]
    assert cells.z[3][0] == pytest.approx(math.log10(35))
    assert figure.layout.xaxis.title.text == "top 2 neurons by largest magnitude, strongest first"
    assert [tuple(m) for m in marks.customdata[-3:]] == [
        (2, 1, "neuron 1", "22"),
        (3, 4, "neuron 4", "35"),
        (3, 1, "neuron 1", "32"),
    ]


# -- images --------------------------------------------------------------------------------------

FIGURE = go.Figure(go.Scatter(y=[1, 3, 2], text=["</script>&<b>"] * 3)).update_layout(height=300)


@pytest.mark.skipif(images.find_chromium() is None, reason="no chromium here")
def test_figures_become_png_and_svg() -> None:
    png = images.image_bytes(FIGURE, "png", width=400, scale=2)
    assert png.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", png[16:24]) == (800, 600)
    svg = xml.dom.minidom.parseString(images.image_bytes(FIGURE, "svg", width=400))
    root = svg.documentElement
    assert (root.tagName, root.getAttribute("width")) == ("svg", "400")


def test_no_chromium_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(UserError, match="PNG and SVG need Chromium or Chrome on this machine"):
        images.image_bytes(FIGURE, "png")


@pytest.mark.parametrize("says", ["", "<div id='image'>waiting</div>", '<div id="image">failed'])
def test_a_chromium_that_draws_nothing_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str
) -> None:
    fake = tmp_path / "chromium"
    fake.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CHROMIUM", str(fake))
    with pytest.raises(UserError, match="Chromium drew no image"):
        images.image_bytes(FIGURE, "svg")


# -- published models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two models: one with a plant in layer 2, and one that is not known."""
    folder = tmp_path_factory.mktemp("models")
    save(build("llama", PLANT), folder / "planted")
    save(build("gpt2", None), folder / "stranger")
    return folder


Known = Callable[..., None]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, store: Path) -> Known:
    """Replace the table of known models by the planted one, and the engine by this process."""

    def launch(fields: dict[str, object], _json: bool) -> Run:
        assert fields["kind"] == "scan"
        fields = {k: v for k, v in fields.items() if k not in ("kind", "device")}
        text = "token 77 is said once, and then it is quiet for a while."
        return finished_scan(text="prompt", prompt=text, **fields)

    monkeypatch.setattr(scans, "launch", launch)
    monkeypatch.setattr(scans, "follow", lambda run, _json: run.status())

    def table(*published: Published) -> None:
        shape = {"model_type": "llama", "n_layers": 6, "hidden_size": 32}
        model = KnownModel("Planted", ("nobody/planted",), shape, published)
        monkeypatch.setattr(scans, "KNOWN", (model,))
        monkeypatch.setattr("zo_core.analysis.known.KNOWN", (model,))

    return table


def published(layer: int | None, rule: str = "down_weights") -> Published:
    return Published(layer, rule, "a test")


def test_verify_known_agrees_with_what_is_planted(known: Known, planted: Path) -> None:
    """The weights are massive, the prompt lacks the token: one rule finds it and one does not."""
    known(published(2), published(None, "massive"))
    done = call("verify-known", planted, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.splitlines()[-1])
    assert [row["agrees"] for row in answer["checked"]] == [True, True]
    first = answer["checked"][0]
    assert (first["name"], first["by"]) == ("Planted", "configuration")
    assert (first["ours"]["layer"], first["ours"]["rule"]) == (2, "down_weights")
    assert first["published"]["sentence"] == "published: layer 2 (a test)"
    assert answer["unknown"] == [str(planted / "stranger")]


def test_verify_known_tells_what_differs(known: Known, planted: Path) -> None:
    known(published(1), published(2, "massive"))
    done = call("verify-known", planted / "planted")
    assert done.exit_code == 1
    assert "DIFFERS: down_weights names layer 2." in done.stdout
    assert "DIFFERS: massive names none." in done.stdout


def test_verify_known_goes_on_after_a_failed_scan(known: Known, planted: Path) -> None:
    """The bundled tokenizer has no BOS to add."""
    known(replace(published(2), bos="with"), published(2))
    done = call("verify-known", planted / "planted", "--json")
    assert done.exit_code == 1, done.exception
    rows = json.loads(done.stdout.splitlines()[-1])["checked"]
    assert [row["agrees"] for row in rows] == [None, True]
    assert "no BOS token" in rows[0]["error"]


def test_verify_known_says_when_there_is_nothing(
    known: Known, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    known(published(2))
    none = call("verify-known", "--json")
    assert none.exit_code == 0
    assert json.loads(none.stdout.splitlines()[-1]) == {"checked": [], "unknown": []}
    assert "Nothing was checked: no known model is in the hub cache." in none.output
    strange = call("verify-known", planted / "stranger")
    assert strange.exit_code == 0
    assert "not a known model, left out" in strange.output
    for path, sentence in ((tmp_path / "no", "is no folder"), (tmp_path, "holds a config.json")):
        refused = call("verify-known", path)
        assert refused.exit_code == 2
        assert sentence in refused.output


def test_a_scan_of_a_known_model_says_what_was_published(
    known: Known, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(published(1), Published(4, "massive", "with BOS only", bos="with"))
    text = "The harbour was quiet in the morning."
    run = finished_scan(model=str(planted / "planted"), text="prompt", prompt=text)
    summary = run.result_json()
    assert summary is not None
    assert summary["bos"]["in_text"] is False
    assert summary["published"]["by"] == "configuration"
    assert [a["layer"] for a in summary["published"]["answers"]] == [1]
    assert "published: layer 1 (a test)" in run_report(run).decode()


# -- the page ------------------------------------------------------------------------------------


def test_page_moves_thresholds_and_compares(store: Path, scan: Run, old: Run) -> None:
    """One session: a threshold of one rule is kept while another is looked at; two scans."""
    other = finished_scan(text="prompt", prompt="The harbour was quiet in the morning.")
    code = f"""
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60).run()
        app.query_params["run"] = {scan.run_id!r}
        app.switch_page("pages/outliers.py").run()
        def table():
            return app.dataframe[0].value.set_index("title")
        print(app.header[0].value)
        print(list(table()["layer"]))
        app.number_input(key="rule_emergence_ratio").set_value(1e6).run()
        print(app.header[0].value)
        app.selectbox(key="outlier_rule").set_value("massive").run()
        app.number_input(key="rule_massive_ratio").set_value(400.0).run()
        print(app.header[0].value)
        print(table()["layer"]["Emergence"], table()["layer"]["Massive activations"])
        app.selectbox(key="outlier_rule").set_value("owl").run()
        app.selectbox(key="rule_owl_m").set_value(13.0).run()
        print(app.header[0].value)
        for part in ("mlp_output", "down_input"):
            app.segmented_control(key="outlier_part").set_value(part).run()
            print([s.value for s in app.subheader if s.value.startswith("Layer by")])
        print(list(app.dataframe[-1].value.columns))
        app.selectbox(key="compare_with").set_value({other.run_id!r}).run()
        print(list(table().columns)[:3], len(app.get("plotly_chart")))
        import pandas as pd
        file = {str(other.result("channels.parquet"))!r}
        channels = pd.read_parquet(file)
        before = channels[channels["part"] == "block_output"].drop(columns="part")
        before.to_parquet(file)
        app.run()
        print(len(app.get("plotly_chart")), [c.value for c in app.caption if "kept no" in c.value])
        app.selectbox(key="scan_run").set_value({old.run_id!r}).run()
        app.selectbox(key="outlier_rule").set_value("int8").run()
        print(app.header[0].value, list(table()["layer"]).count("not in this scan"))
        assert not app.exception, app.exception
    """
    lines = run_python(code, store).strip().splitlines()
    assert lines[0] == "Layer 3 (4th of 16) is the first outlier layer"
    assert lines[1] == "['3', 'none found', 'none found', '3', '3', '0', '3', '0']"
    assert lines[2] == "No first outlier layer"
    assert lines[3] == "Layer 3 (4th of 16) is the first outlier layer"
    assert lines[4] == "none found 3"
    assert "has the largest weight" in lines[5]
    by_token = "Layer by token, block output"
    assert lines[6] == str(["Layer by channel, MLP output", by_token])
    assert lines[7] == str(["Layer by neuron, down-projection input", by_token])
    assert lines[8] == "['neuron', 'magnitude']"
    # Rules, and twice: profile, kurtosis, channels and tokens; and the layer weights.
    assert lines[9] == "['layer', 'other', 'agree'] 10"
    assert lines[10].startswith("9 ['This scan is of a version that kept no neurons of this part")
    assert lines[11] == "This scan cannot tell 4"
