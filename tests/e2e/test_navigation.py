"""Going from page to page while timers run."""

import pytest
from playwright.sync_api import Page, WebSocketRoute, expect

from tests.e2e.actions import settled
from tests.e2e.conftest import App

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
TIMER = 2500
"""Milliseconds, more than the engine panel waits between two looks."""


def test_a_late_timer_does_not_empty_the_page(page: Page, app: App) -> None:
    """The browser asks for a fragment of the page it is about to leave, as on a slow line."""
    held: list[str | bytes] = []
    slow = False

    def line(browser: WebSocketRoute) -> None:
        server = browser.connect_to_server()

        def to_browser(message: str | bytes) -> None:
            held.append(message)
            if not slow:
                deliver()

        def deliver() -> None:
            while held:
                browser.send(held.pop(0))

        nonlocal release
        release = deliver
        server.on_message(to_browser)

    def release() -> None:
        raise AssertionError("no connection")

    page.route_web_socket("**/_stcore/stream", line)
    page.goto(f"{app.url}/outliers")
    settled(page)
    expect(page.get_by_role("heading", name="Outliers")).to_be_visible()
    page.wait_for_timeout(TIMER)
    for name in ("Sensitivity", "Runs"):
        slow = True
        page.get_by_role("link", name=name).first.click()
        page.wait_for_timeout(TIMER)
        slow = False
        release()
        expect(page.get_by_role("heading", name=name)).to_be_visible()
        page.wait_for_timeout(TIMER)
        expect(page.get_by_role("heading", name=name)).to_be_visible()
