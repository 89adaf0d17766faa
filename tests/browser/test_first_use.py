"""From an empty ComfyUI to the first picture in FP8: each thing that a user does is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from harness.fixtures import ENOUGH_STEPS, start_over
from harness.panelpage import JOB_MILLISECONDS, PanelPage
from harness.server import ComfyUIServer
from playwright.sync_api import Browser, expect

from .conftest import open_page

pytestmark = pytest.mark.browser

ACTIONS = 4
RUNS = 2  # 33 with a picture each
# What makes the toy's pictures quick; a user leaves all of it as it is.
SMALL = """(values) => {
    for (const node of app.graph._nodes) {
        for (const widget of node.widgets ?? []) {
            if (widget.name in values) widget.value = values[widget.name]
        }
    }
}"""
# ComfyUI's own workflow, which is open till then, has a KSampler too.
IS_OPEN = "app.graph._nodes.some((one) => one.type === 'HSWQCheckpointLoader')"
VALUES = {"width": 32, "height": 32, "batch_size": 32, "steps": ENOUGH_STEPS, "rounding": "nearest"}


class User:
    """What a user does, and how often."""

    def __init__(self) -> None:
        """Nothing so far."""
        self.actions = 0

    def does(self, action: Callable[[], None]) -> None:
        """Do and count one thing."""
        self.actions += 1
        action()


@contextmanager
def empty(browser: Browser, host: ComfyUIServer) -> Iterator[PanelPage]:
    """The page of a ComfyUI in which nothing was done yet, with one checkpoint."""
    start_over(host)
    with open_page(browser, host) as page:
        yield PanelPage(page)


@pytest.mark.parametrize("host", ["pinned_server", "server"])
def test_takes_four_actions(browser: Browser, host: str, request: pytest.FixtureRequest):
    """The panel, its workflow (with the checkpoint that is there), the number of runs, Run."""
    user = User()
    with empty(browser, request.getfixturevalue(host)) as panel:
        page = panel.page
        user.does(panel.toggle)
        user.does(panel.button("Open the first workflow").click)
        page.wait_for_function(IS_OPEN)
        page.evaluate(SMALL, VALUES)
        count = page.get_by_test_id("action-bar-buttons").locator("xpath=following::input").first
        user.does(lambda: count.fill(str(RUNS)))
        user.does(page.get_by_test_id("queue-button").first.click)
        on = panel.root.locator(".hswq-on")
        expect(on).to_have_attribute("data-on", "true", timeout=JOB_MILLISECONDS)
        expect(on).to_contain_text("32 images, FP8")
        assert user.actions == ACTIONS
