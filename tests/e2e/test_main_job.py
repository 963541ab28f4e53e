"""The main job as a person does it: scan, probe, export, tune, watch, reload, cancel, look back."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.actions import SLOW, cancel, click_chart, download, fill, key, press, settled
from tests.e2e.conftest import App

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def passes(page: Page) -> int:
    """Forward passes that the live run shows."""
    text = key(page, "tune_facts").inner_text()
    found = re.search(r"Forward passes\s+([\d,]+)", text)
    return int(found[1].replace(",", "")) if found else 0


def wait_for_more(page: Page, than: int) -> int:
    """Wait until the live run shows more forward passes."""
    for _ in range(120):
        now = passes(page)
        if now > than:
            return now
        page.wait_for_timeout(500)
    raise AssertionError(f"the curve did not grow beyond {than} forward passes")


def test_load_scan_and_click_a_layer(page: Page, app: App, tmp_path: Path) -> None:
    """Load the model, scan it, read the verdict, move a threshold, click a layer, export."""
    page.goto(app.url)
    settled(page)
    press(page, "load_model")
    expect(key(page, "unload_models")).to_be_visible(timeout=SLOW)

    page.get_by_role("link", name="Outliers").first.click()
    settled(page)
    press(page, "start_scan")
    verdict = key(page, "verdict")
    expect(verdict).to_contain_text("Layer 3 (4th of 16)", timeout=SLOW)
    assert "run=" in page.url

    fill(page, "rule_emergence_ratio", "5000")
    expect(verdict).to_contain_text(re.compile("none found", re.IGNORECASE))
    fill(page, "rule_emergence_ratio", "100")
    expect(verdict).to_contain_text("Layer 3")

    click_chart(page, "channel_chart", 0.5, 0.97)
    expect(key(page, "layer_detail")).not_to_contain_text("layer 3 ")

    key(page, "outlier_part").get_by_text("Down-projection input").click()
    settled(page)
    expect(key(page, "all_verdicts")).to_be_visible()

    table = pd.read_csv(download(page, "download_csv", tmp_path))
    assert table.loc[table["layer"] >= 0, "top1"].idxmax() > 3
    assert len(table[table["layer"] >= 0]) == 16
    figure = download(page, "download_html", tmp_path)
    assert "plotly" in figure.read_text().lower()
    assert figure.name.endswith("profile-down-projection-input.html")
    assert download(page, "download_png", tmp_path).read_bytes().startswith(b"\x89PNG")
    report = download(page, "download_report", tmp_path).read_text()
    assert "The emergence rule names layer 3." in report


def test_probe_and_parse_its_csv(page: Page, app: App, tmp_path: Path) -> None:
    """Probe two layers and read the tidy CSV and its sidecar."""
    page.goto(f"{app.url}/sensitivity")
    settled(page)
    fill(page, "probe_draws", "2")
    fill(page, "probe_layers", "3, 4")
    press(page, "start_probe")
    expect(key(page, "download_summary")).to_be_visible(timeout=SLOW)
    table = pd.read_csv(download(page, "download_csv", tmp_path))
    assert list(table.columns) == ["layer", "draw", "metric", "value"]
    assert set(table["layer"]) == {3, 4}
    assert set(table["draw"]) == {0, 1}
    assert table["value"].notna().all()
    sidecar = json.loads(download(page, "download_summary", tmp_path).read_text())
    assert sidecar["job"]["draws"] == 2
    assert sidecar["provenance"]["packages"]["torch"]


def test_tune_live_reload_cancel_and_find_it_again(page: Page, app: App, tmp_path: Path) -> None:
    """From the outlier page's button to a live curve, a reload, a cancel, the Runs page."""
    page.goto(f"{app.url}/outliers")
    settled(page)
    page.get_by_role("link", name="Fine-tune dominant layer").click()
    expect(key(page, "start_tune")).to_be_visible()
    expect(key(page, "start_tune_command")).to_contain_text("layer:3")
    fill(page, "tune_steps", "0")
    expect(key(page, "start_tune_command")).to_contain_text("steps")
    fill(page, "tune_steps", "5000")
    press(page, "start_tune")
    expect(key(page, "cancel_run")).to_be_visible(timeout=SLOW)
    first = wait_for_more(page, 0)
    second = wait_for_more(page, first)
    expect(key(page, "loss_chart")).to_be_visible()

    page.reload()
    settled(page)
    third = wait_for_more(page, second)

    cancel(page)
    expect(key(page, "resume_run")).to_be_visible()
    assert passes(page) >= third
    metrics = pd.read_csv(download(page, "download_metrics", tmp_path))
    assert metrics["step"].max() * 2 >= third
    run_id = re.search(r"run=([\w-]+)", page.url)
    assert run_id is not None

    page.get_by_role("link", name="Runs").first.click()
    settled(page)
    expect(key(page, "runs_table")).to_be_visible()
    assert (app.cache / "runs" / run_id[1] / "checkpoint.safetensors").is_file()


def test_a_killed_server_loses_nothing(page: Page, app: App) -> None:
    """Kill the app in mid-run: after a restart the run is interrupted, and resumes."""
    page.goto(f"{app.url}/fine_tune")
    settled(page)
    press(page, "resume_run")
    seen = wait_for_more(page, passes(page))
    url = page.url
    page.goto("about:blank")  # a lost connection is no error of the page
    app.kill()
    app.start()
    page.goto(url)
    settled(page)
    expect(key(page, "run_header")).to_contain_text("interrupted")
    press(page, "resume_run")
    wait_for_more(page, seen)
    cancel(page)
    expect(key(page, "resume_run")).to_be_visible()


@pytest.mark.parametrize("path", ["outliers", "sensitivity", "fine_tune"])
def test_an_unknown_run_is_a_sentence(page: Page, app: App, path: str) -> None:
    """A link to a run that is not there says so, whatever the id."""
    page.goto(f"{app.url}/{path}?run=../../etc")
    settled(page)
    expect(page.get_by_text("There is no run")).to_be_visible()
    expect(page.get_by_text("Traceback")).to_have_count(0)
