"""Going from page to page while timers run."""

import pytest
from playwright.sync_api import Page, WebSocketRoute, expect
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from tests.e2e.actions import key, settled
from tests.e2e.conftest import App

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
TIMER = 2500
"""Milliseconds, more than the engine panel waits between two looks."""


class SlowLine:
    """The connection of a tab; after :meth:`stall` it holds back what follows the end of a run."""

    def __init__(self, page: Page) -> None:
        """Stand between the page and the app."""
        self._held: list[str | bytes] = []
        self._stalls = self._stalled = False
        page.route_web_socket("**/_stcore/stream", self._connect)

    def _connect(self, browser: WebSocketRoute) -> None:
        self._browser = browser
        browser.connect_to_server().on_message(self._take)

    def _take(self, message: str | bytes) -> None:
        self._held.append(message)
        if not self._stalled:
            self._deliver()
        assert isinstance(message, bytes)
        ended = ForwardMsg.FromString(message).WhichOneof("type") == "script_finished"
        self._stalled |= self._stalls and ended

    def _deliver(self) -> None:
        while self._held:
            self._browser.send(self._held.pop(0))

    def stall(self) -> None:
        """Hold back from the end of the next run on."""
        self._stalls = True

    def go_on(self) -> None:
        """Deliver everything."""
        self._stalls = self._stalled = False
        self._deliver()


def test_a_late_timer_does_not_empty_the_next_page(page: Page, app: App) -> None:
    """Between the run that leaves a page and the run of the next one no timer may ask for more."""
    line = SlowLine(page)
    page.goto(app.url)
    settled(page)
    page.wait_for_timeout(TIMER)
    line.stall()
    key(page, "open_outliers").locator("a, button").first.click()
    page.wait_for_timeout(2 * TIMER)
    line.go_on()
    heading = page.get_by_role("heading", name="Outliers", exact=True)
    expect(heading).to_be_visible()
    page.wait_for_timeout(TIMER)
    expect(heading).to_be_visible()
