"""A comparison in a real browser: cells fill, reload, cancel, resume, a killed app, the report."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.e2e.actions import SLOW, cancel, download, key, press, settled
from tests.e2e.conftest import App

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
SPEC = """
title: two layers
seeds: [0, 1, 2]
steps: 20
batch_size: 4
train_examples: 32
eval_examples: 16
dev_examples: 16
evaluations: 1
arms:
  - {name: zero-shot, scope: zero-shot}
  - {name: late, scope: 'layer:15', lr: 1.0e-4}
  - {name: dominant, scope: 'layer:auto', lr: [1.0e-4]}
"""
CELLS = 6
PATIENCE = 480_000  # milliseconds: engine and model may have to start on a busy machine


def filled(page: Page) -> Locator:
    """Cells that show a result: a percentage with one decimal."""
    return page.locator(".zo-cells td a").filter(has_text=re.compile(r"^\d+\.\d$"))


def test_a_comparison_from_upload_to_report(page: Page, app: App, tmp_path: Path) -> None:
    page.goto(f"{app.url}/compare")
    settled(page)
    expect(page.get_by_text("No comparison yet")).to_be_visible(timeout=SLOW)
    expect(key(page, "start_comparison_command")).to_contain_text("compare quick", timeout=SLOW)

    key(page, "compare_source").get_by_text("Own YAML").click()
    editor = key(page, "compare_yaml").locator("textarea")
    editor.fill("arms: 3")
    editor.press("Control+Enter")
    expect(key(page, "start_comparison_command")).to_contain_text("arms is 3", timeout=SLOW)
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)
    key(page, "compare_upload").locator("input[type=file]").set_input_files(file)
    expect(key(page, "start_comparison_command")).to_contain_text("compare spec.yaml", timeout=SLOW)
    press(page, "start_comparison")
    expect(key(page, "cancel_comparison")).to_be_visible(timeout=SLOW)
    assert "comparison=" in page.url
    expect(filled(page).first).to_be_visible(timeout=PATIENCE)

    page.reload()
    settled(page)
    expect(filled(page).first).to_be_visible(timeout=PATIENCE)
    cancel(page, "cancel_comparison")
    expect(key(page, "resume_comparison")).to_be_visible(timeout=SLOW)
    expect(key(page, "comparison_header")).to_contain_text("Cancelled", timeout=SLOW)
    first = filled(page).count()
    assert 1 <= first < CELLS, "cancelled half-way"
    runs = {a.get_attribute("href") for a in filled(page).all()}

    press(page, "resume_comparison")
    expect(key(page, "cancel_comparison")).to_be_visible(timeout=SLOW)
    url = page.url
    page.goto("about:blank")
    app.kill()  # and the engine with it: the driver goes on with one of its own
    app.start()
    page.goto(url)
    settled(page)
    expect(filled(page)).to_have_count(CELLS, timeout=PATIENCE)
    expect(key(page, "comparison_header")).to_contain_text("last session", timeout=SLOW)
    assert runs <= {a.get_attribute("href") for a in filled(page).all()}, "no finished cell again"

    facts = json.loads(download(page, "download_table_json", tmp_path).read_text())
    tuned = [c for c in facts["cells"] if c["arm"] != "zero-shot"]
    assert [c["state"] for c in tuned] == ["done"] * CELLS
    report = download(page, "download_report", tmp_path).read_text()
    for words in ("<h1>two layers</h1>", "Plotly.newPlot", "compare spec.yaml", "torch", "(b) "):
        assert words in report
    assert "<script src" not in report, "self-contained"
