"""Looking inside: the Mechanism page, and the further analyses of the Sensitivity page."""

import io
import re
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.actions import SLOW, choose, click_chart, download, fill, key, press, settled
from tests.e2e.conftest import App

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_mechanism_of_the_bundled_model(page: Page, app: App, tmp_path: Path) -> None:
    """Run it, read who writes, click a layer, find it in the link, export."""
    page.goto(f"{app.url}/mechanism")
    settled(page)
    expect(page.get_by_text("Nobody has looked inside this model yet")).to_be_visible()
    fill(page, "mechanism_sequences", "2")
    fill(page, "mechanism_max_tokens", "48")
    fill(page, "mechanism_channels", "0")
    press(page, "start_mechanism")
    expect(page.get_by_text("channels is 0: input should be greater")).to_be_visible()
    fill(page, "mechanism_channels", "2")
    press(page, "start_mechanism")
    story = key(page, "mechanism_story")
    expect(story).to_contain_text("The MLP of layer 3 (4th of 16) writes it", timeout=SLOW)
    expect(key(page, "download_csv")).to_be_visible(timeout=SLOW)
    layer = key(page, "mechanism_detail").get_by_role("combobox")
    expect(layer).to_have_value("layer 3 (4th of 16)")

    click_chart(page, "sink_chart", 0.43, 6.5 / 16)
    expect(layer).to_have_value("layer 6 (7th of 16)")
    expect(page).to_have_url(re.compile(r"[?&]layer=6"))
    page.reload()
    settled(page)
    expect(layer).to_have_value("layer 6 (7th of 16)", timeout=SLOW)

    sites = pd.read_csv(download(page, "download_csv", tmp_path))
    assert sites.loc[0, ["writer_layer", "writer"]].tolist() == [3, "mlp"]
    choose(page, "export_table", "interventions")
    file = download(page, "download_parquet", tmp_path)
    assert file.name.endswith("-interventions.parquet")
    table = pd.read_parquet(io.BytesIO(file.read_bytes()))
    assert set(table["layer"]) == set(range(16))
    html = download(page, "download_html", tmp_path).read_text()
    assert "Residual stream at the massive activation" in html
    choose(page, "export_figure", "Interventions")
    png = download(page, "download_png", tmp_path)
    assert png.name.endswith("-interventions.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    report = download(page, "download_report", tmp_path).read_text()
    assert "The MLP of layer 3 writes the massive activation." in report
    whole = download(page, "download_whole", tmp_path)
    assert whole.name == "demo-report.html"
    for text in ("The MLP of layer 3 writes", "python -m zo_core probe --model demo"):
        assert text in whole.read_text(), text
    # It opens without a network, and draws.
    page.context.set_offline(True)
    page.goto(whole.as_uri())
    expect(page.locator(".part .main-svg").first).to_be_visible()
    expect(page.get_by_role("link", name="Mechanism")).to_be_visible()
    page.context.set_offline(False)


def test_probe_with_every_further_analysis(page: Page, app: App, tmp_path: Path) -> None:
    """Two batches, a sweep and equal own change on two layers; a click chooses a layer."""
    page.goto(f"{app.url}/sensitivity")
    settled(page)
    for name, value in (
        ("probe_draws", "2"),
        ("probe_batch_size", "2"),
        ("probe_layers", "14, 15"),
        ("probe_batches", "2"),
        ("probe_eps_sweep", "1e-4, 1e-3"),
    ):
        fill(page, name, value)
    expect(page.get_by_text("needs at least three different values")).to_be_visible()
    fill(page, "probe_eps_sweep", "1e-4, 1e-3, 1e-2")
    key(page, "probe_scalings").get_by_role("button", name="same own change").click()
    settled(page)
    press(page, "start_probe")
    expect(key(page, "download_csv")).to_be_visible(timeout=SLOW)
    expect(key(page, "recommended_eps")).to_contain_text("ecommended")
    expect(page.get_by_text("Sign agreement: share of pairs of batches")).to_be_visible()
    layer = key(page, "probe_detail").get_by_role("combobox")
    # Rows are layer 14, which is chosen if it has the larger mean |g|, and layer 15.
    for row, name in ((0.25, "layer 14 (15th of 16)"), (0.75, "layer 15 (16th of 16)")):
        click_chart(page, "propagation_chart", 0.75, row)
        expect(layer).to_have_value(name)
    expect(page).to_have_url(re.compile(r"[?&]layer=15"))
    choose(page, "export_table", "propagation")
    table = pd.read_csv(download(page, "download_csv", tmp_path))
    own = table[table["layer"] == table["block"]]
    assert (own["amplification"] == 1).all()
    key(page, "probe_scaling").get_by_text("same own change").click()
    settled(page)
    expect(key(page, "probe_scaling").get_by_role("radio", checked=True)).to_have_accessible_name(
        "same own change"
    )
    assert page.locator('[data-testid="stException"]').count() == 0
