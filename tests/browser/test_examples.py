"""The example workflows in ComfyUI's own page."""

import re
import urllib.request
from collections.abc import Iterator
from itertools import combinations

import pytest
from harness.client import Client
from harness.fixtures import start_over
from harness.prompts import CHECKPOINT
from harness.server import ComfyUIServer
from playwright.sync_api import Browser, Page, expect

from .conftest import open_page

pytestmark = pytest.mark.browser

RECORDED = "16 bit for now: 0 of 32 images recorded"
EXAMPLES = ("hswq_first_use", "hswq_more_calibration_node", "hswq_more_converter_node")

OPEN = """async (name) => {
    const template = await fetch(`/api/workflow_templates/hswq/${name}.json`)
    await app.loadGraphData(await template.json())
}"""
MISSING = """() => app.graph._nodes
    .filter((node) => node.has_errors || !LiteGraph.registered_node_types[node.type])
    .map((node) => node.type)"""
BOXES = "() => app.graph._nodes.map((node) => [node.type, ...node.getBounding()])"
# Small, so that it takes seconds: all else is as it was opened.
RUN = """async () => {
    const set = (type, name, value) => {
        const node = app.graph._nodes.find((node) => node.type === type)
        node.widgets.find((widget) => widget.name === name).value = value
    }
    set("EmptyLatentImage", "width", 64)
    set("EmptyLatentImage", "height", 64)
    set("KSampler", "steps", 2)
    await app.queuePrompt(0)
}"""
CHOSEN = """() => app.graph._nodes.find((node) => node.type === "HSWQCheckpointLoader")
    .widgets.find((widget) => widget.name === "ckpt_name").value"""
LINE = """(type) => app.graph._nodes.find((node) => node.type === type)
    .widgets.find((widget) => widget.name === "hswq_line")?.value"""


def overlap(a: list, b: list) -> bool:
    """Tell whether two boxes (type, x, y, width, height) overlap."""
    return all(
        a[axis] < b[axis] + b[axis + 2] and b[axis] < a[axis] + a[axis + 2] for axis in (1, 2)
    )


@pytest.fixture(scope="module")
def page(browser: Browser, server: ComfyUIServer) -> Iterator[Page]:
    """One for all: a workflow that is opened takes the place of the one before."""
    start_over(server)
    with open_page(browser, server) as page:
        yield page


class TestExamples:
    def test_are_offered_with_a_picture(self, server: ComfyUIServer, client: Client):
        offered = client.get_json("/api/workflow_templates")
        assert sorted(offered["hswq"]) == list(EXAMPLES)  # ComfyUI lists them as the disk does
        for name in EXAMPLES:
            address = f"{server.url}/api/workflow_templates/hswq/{name}.jpg"
            with urllib.request.urlopen(address) as response:
                assert response.headers["Content-Type"] == "image/jpeg"

    @pytest.mark.parametrize("name", EXAMPLES)
    def test_open_without_a_missing_node(self, page: Page, name: str):
        page.evaluate(OPEN, name)
        boxes = page.evaluate(BOXES)
        assert len(boxes) >= 8
        assert page.evaluate(MISSING) == []
        assert [(a, b) for a, b in combinations(boxes, 2) if overlap(a, b)] == []

    def test_first_use_takes_a_checkpoint_that_is_there(
        self, browser: Browser, server: ComfyUIServer
    ):
        """Whatever it is called: nothing is red, and no model is said to be missing."""
        checkpoint = server.models / "checkpoints" / CHECKPOINT
        mine = checkpoint.rename(checkpoint.with_name("my_model.safetensors"))
        try:
            with open_page(browser, server) as page:
                page.evaluate(OPEN, "hswq_first_use")
                assert page.evaluate(MISSING) == []
                assert page.evaluate(CHOSEN) == mine.name
        finally:
            mine.rename(checkpoint)

    def test_first_use_comes_first(self, page: Page):
        page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("hswq", exact=True).click()
        expect(dialog.get_by_text(re.compile("^hswq_"))).to_have_text(EXAMPLES)
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)

    @pytest.mark.parametrize(
        ("name", "node", "line"),
        [
            ("hswq_first_use", "HSWQCheckpointLoader", f"{RECORDED}; the HSWQ panel keeps count"),
            ("hswq_more_calibration_node", "HSWQCalibration", "1 of 256 images in 'calibration'"),
        ],
    )
    def test_run_and_say_what_they_do(
        self, client: Client, page: Page, name: str, node: str, line: str
    ):
        page.evaluate(OPEN, name)
        page.evaluate(RUN)
        page.wait_for_function(f"(type) => ({LINE})(type)", arg=node)
        assert page.evaluate(LINE, node) == line
