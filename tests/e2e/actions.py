"""What a person does on a page: type, press, click into a chart, download."""

import re
from pathlib import Path

from playwright.sync_api import Page, expect

SLOW = 180_000  # milliseconds; jobs on a busy two-core machine


def settled(page: Page) -> None:
    """Wait until the script of the page has run."""
    page.wait_for_selector('[data-test-script-state="notRunning"]')


def at_rest(page: Page) -> None:
    """Wait for the script, and for the rerun after a click or a live view, which may begin late."""
    page.wait_for_timeout(1500)
    settled(page)


def key(page: Page, name: str):  # noqa: ANN201 - a playwright Locator
    """The element of a widget key."""
    return page.locator(f".st-key-{name}")


def press(page: Page, name: str) -> None:
    """Click the button of a widget key."""
    key(page, name).get_by_role("button").first.click()


def cancel(page: Page, name: str = "cancel_run") -> None:
    """Ask the run, or the comparison, on the page to stop, as soon as the button is there."""
    button = key(page, name).get_by_role("button", name="Cancel", exact=True)
    button.click()
    expect(button).to_have_count(0)


def fill(page: Page, name: str, value: str) -> None:
    """Type into the field of a widget key and leave it."""
    field = key(page, name).locator("input").first
    field.fill(value)
    field.press("Enter")
    settled(page)


def choose(page: Page, name: str, text: str) -> None:
    """Choose the option of a list whose text begins so; a rerun or scrolling would close it."""
    field = key(page, name).locator("input").first
    field.scroll_into_view_if_needed()
    at_rest(page)
    field.click()
    page.get_by_role("option", name=re.compile(f"^{re.escape(text)}")).click()
    settled(page)


def download(page: Page, name: str, folder: Path) -> Path:
    """Press a download button once the page is at rest; the file's path."""
    at_rest(page)
    with page.expect_download() as waiting:
        press(page, name)
    target = folder / waiting.value.suggested_filename
    waiting.value.save_as(target)
    return target


def click_chart(page: Page, name: str, across: float, down: float) -> None:
    """Click into the plot area of a chart, at shares of its width and height.

    Two clicks within a third of a second are a double click to plotly, which selects nothing.
    """
    at_rest(page)
    area = key(page, name).locator(".nsewdrag").first
    size = area.evaluate("rect => [rect.getBBox().width, rect.getBBox().height]")
    # A click through the locator waits until the chart stands still, and starts again where a
    # rerun of the page has just replaced it.
    area.click(position={"x": size[0] * across, "y": size[1] * down})
