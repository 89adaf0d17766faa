"""The list of models: short, searched, sorted, with details in place; and the way from a node."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import torch
from harness.client import Client
from harness.panelpage import PanelPage
from harness.prompts import hswq_loader, numbered, stock_loader, text_to_latent
from harness.server import ComfyUIServer
from hswq.calibration import LayerStatistics, Statistics, save_statistics
from playwright.sync_api import expect

from .test_examples import BOXES, overlap
from .test_node_lines import FIT, OPEN, RUN, SET

pytestmark = pytest.mark.browser

PROMPT = text_to_latent(stock_loader())
# All other nodes in a column below the stock loader, without a gap.
CROWD = """() => {
    const loader = app.graph._nodes.find((one) => one.type === "CheckpointLoaderSimple")
    let y = loader.pos[1]
    for (const node of [loader, ...app.graph._nodes.filter((one) => one !== loader)]) {
        node.pos = [loader.pos[0] + (node === loader ? 0 : 30), y]
        y += node.size[1] + LiteGraph.NODE_TITLE_HEIGHT
    }
}"""
# How the list shows what is clicked, when all that the panel does about the click is done.
NOTE_CLICKED = """() => addEventListener("click", ({ target }) => {
    window.clicked = target.closest(".hswq-model")?.ariaExpanded
}, { once: true })"""
MODELS = 40
LAYERS = 8
LINE = 40  # pixels


@pytest.fixture
def many(panel: PanelPage, server: ComfyUIServer) -> PanelPage:
    """The panel of a server with many models whose files are elsewhere."""
    one = LayerStatistics(1.0, 2.0, 9, torch.ones(8, dtype=torch.float64), 9, 3.0)
    layers = {f"blocks.{number}.to_q": one for number in range(LAYERS)}
    for number in range(MODELS - 1):
        its = secrets.token_hex(32)
        meta = {"fingerprint": its, "model": f"model {number:02}.safetensors", "samples": number}
        meta |= {"recording": secrets.token_hex(8), "last_run": f"2026-01-{number % 28 + 1:02}"}
        path = server.models / "hswq" / f"m{number}.{its[:16]}.recorded.pt"
        save_statistics(Statistics(layers, {**meta, "layers": LAYERS}), path)
    panel.open()
    expect(panel.models).to_have_count(MODELS)
    return panel


class TestMany:
    def test_are_listed_opened_searched_and_sorted(self, many: PanelPage):
        self.have_a_line_each_and_details_in_place(many)
        self.are_searched_and_sorted(many)

    def have_a_line_each_and_details_in_place(self, many: PanelPage) -> None:
        assert all(row.bounding_box()["height"] <= LINE for row in many.models.all())
        last = many.models.filter(has_text="model 00")
        many.page.evaluate(NOTE_CLICKED)
        last.click()
        assert many.page.evaluate("window.clicked") == "true", "it opens later than it is clicked"
        expect(last).to_have_attribute("aria-expanded", "true")
        expect(many.root.locator(".hswq-detail")).to_have_count(1)
        expect(many.root.get_by_text("images until FP8")).to_be_in_viewport()
        last.click()
        expect(many.root.locator(".hswq-detail")).to_have_count(0)

    def are_searched_and_sorted(self, many: PanelPage) -> None:
        many.root.get_by_role("combobox", name="Order").select_option("name")
        expect(many.models.first).to_contain_text("model 00")
        many.root.get_by_role("combobox", name="Order").select_option("images")
        expect(many.models.first).to_contain_text("sd_xl_base")
        many.models.first.click()  # whatever is searched for, what is open stays
        many.root.get_by_role("searchbox", name="Find a model").fill("MODEL 17")
        expect(many.models).to_have_text(["sd_xl_base_1.040 images", "model 1717 of 32"])


class TestFP8Files:
    def test_are_folded_away_and_take_no_place(self, panel: PanelPage, server: ComfyUIServer):
        client = Client(server.url)
        panel.open()
        panel.expect_file()
        panel.export("of_fp8")
        panel.expect_job("done")
        client.run(text_to_latent(hswq_loader("of_fp8.safetensors"), steps=1))
        (server.base / "output" / "checkpoints" / "of_fp8.safetensors").unlink()
        expect(panel.root.locator("summary").last).to_contain_text("1 model that is not recorded")
        expect(panel.models).to_have_count(1)
        panel.expect_samples(40)
        panel.toggle()
        panel.open()
        expect(panel.models).to_have_attribute("aria-expanded", "true")


@pytest.fixture(params=[False, True], ids=["classic", "nodes-2.0"])
def beside(request: pytest.FixtureRequest, panel: PanelPage) -> Iterator[PanelPage]:
    """The panel in a page with a loader that has run, in both looks of nodes."""
    panel.page.evaluate(SET, ["Comfy.VueNodes.Enabled", request.param])
    try:
        panel.page.evaluate(OPEN, numbered(text_to_latent(hswq_loader(), steps=1)))
        panel.page.evaluate(RUN)
        panel.page.evaluate(FIT)
        yield panel
    finally:
        panel.page.evaluate(SET, ["Comfy.VueNodes.Enabled", False])


class TestApply:
    def test_puts_a_new_loader_free_of_other_nodes(self, panel: PanelPage):
        """Below the stock loader of the same file, whose place there is taken."""
        page = panel.page
        page.evaluate("async (prompt) => app.loadApiJson(prompt, 'mine')", numbered(PROMPT))
        page.evaluate(CROWD)
        panel.open()
        panel.button("Apply to loader").click()
        expect(panel.root).to_contain_text("is new in your graph")
        boxes = page.evaluate(BOXES)
        assert len(boxes) == len(PROMPT) + 1
        new = next(box for box in boxes if box[0] == "HSWQCheckpointLoader")
        assert [box[0] for box in boxes if box is not new and overlap(box, new)] == []


class TestNode:
    def test_says_the_panels_sentence_and_leads_there(self, beside: PanelPage):
        line = beside.page.locator(".hswq-node-line:visible")
        line.get_by_role("button").press("Enter")
        expect(beside.models).to_have_attribute("aria-expanded", "true")
        on = beside.root.locator(".hswq-on")
        expect(on).to_have_attribute("data-on", "true")
        said = on.locator(".hswq-sentence").inner_text()
        assert ", 40 images, FP8" in said
        assert ", error " in said
        expect(line).to_contain_text(f"{said}; ")
        expect(beside.fact("sentence")).to_have_text(said)
        beside.button("Show node").click()
        expect(line).to_be_visible()
