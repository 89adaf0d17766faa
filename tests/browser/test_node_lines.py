"""What a node tells about its last run stays on it: past the job's end, a reload, a cached run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness.fixtures import change_settings, start_over
from harness.prompts import hswq_loader, node, text_to_latent, through
from harness.server import ComfyUIServer
from playwright.sync_api import Browser, Locator, Page, expect

from .conftest import READY, open_page

pytestmark = pytest.mark.browser

LOADED = "16 bit for now: 0 of 32 images recorded"
COUNTED = "1 of 256 images in 'by-hand'"
COMPARED = "SSIM 0.0025, PSNR 14.0 dB"
TOLD = (LOADED, COUNTED, COMPARED)

OPEN = """async (prompt) => {
    await app.loadApiJson(prompt, "lines")
    const graph = app.graph.serialize()
    const sampler = graph.nodes.find((node) => node.type === "KSampler")
    sampler.widgets_values = sampler.widgets_values.map((v) => (v === "randomize" ? "fixed" : v))
    await app.loadGraphData(graph)  // a workflow like one that was drawn
}"""
RUN = """() => new Promise(async (resolve, reject) => {
    const { api } = window.comfyAPI.api
    api.addEventListener("execution_success", () => resolve(), { once: true })
    api.addEventListener("execution_error", (event) => reject(event.detail), { once: true })
    if (!(await app.queuePrompt(0))) reject("the prompt was not queued")
})"""
FIT = "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"
SET = "([id, value]) => app.extensionManager.setting.set(id, value)"
FORGET = "() => sessionStorage.removeItem('HSWQ.lines')"
SAVED = "() => JSON.stringify(app.graph.serialize())"
SENT = "async () => JSON.stringify((await app.graphToPrompt()).output)"
CUT_OFF = """() => [...document.querySelectorAll(".hswq-node-line")]
    .filter((one) => one.scrollHeight > one.clientHeight).map((one) => one.textContent)"""
SETTLED_MILLISECONDS = 1500  # a frontend that clears lines does so within a second


@pytest.fixture(
    params=[("pinned_server", False), ("server", False), ("server", True)],
    ids=["pinned", "newest", "newest-nodes-2.0"],
)
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """ComfyUI's page, which keeps its workflow over a reload, as users' pages do."""
    name, nodes_2 = request.param
    host: ComfyUIServer = request.getfixturevalue(name)
    start_over(host)
    settings = {"Comfy.Workflow.Persist": True, "Comfy.VueNodes.Enabled": nodes_2}
    change_settings(host, settings)
    with open_page(browser, host) as page:
        yield page
        for setting in settings:
            page.evaluate(SET, [setting, False])


def workflow() -> dict:
    """A loader, a calibration and a comparison, by numbers as a page has them."""
    prompt = text_to_latent(hswq_loader(), steps=1)
    calibration = node("HSWQCalibration", model=["loader", 0], session="by-hand")
    prompt = through(prompt, "calibration", calibration)
    pictures = {"width": 32, "height": 32, "batch_size": 1}
    prompt |= {
        "black": node("EmptyImage", color=0, **pictures),
        "dark": node("EmptyImage", color=0x333333, **pictures),
        "compare": node("HSWQCompare", original=["black", 0], image=["dark", 0], amplify=2.0),
    }
    numbers = {name: str(number) for number, name in enumerate(prompt, 1)}
    for one in prompt.values():
        for name, value in one["inputs"].items():
            if isinstance(value, list):
                one["inputs"][name] = [numbers[value[0]], value[1]]
    return {numbers[name]: one for name, one in prompt.items()}


def lines(page: Page) -> Locator:
    """Return all lines that nodes show."""
    return page.locator(".hswq-node-line:visible")


def expect_lines(page: Page, *texts: str) -> None:
    """Each is there once, and stays."""
    page.evaluate(FIT)  # ComfyUI shows nothing of nodes that are out of sight
    for text in texts:
        expect(lines(page).filter(has_text=text)).to_have_count(1)
    page.wait_for_timeout(SETTLED_MILLISECONDS)
    for text in texts:
        expect(lines(page).filter(has_text=text)).to_have_count(1)
    expect(lines(page)).to_have_count(len(texts))
    assert page.evaluate(CUT_OFF) == []


def reload(page: Page) -> None:
    page.reload()
    page.wait_for_function(READY)
    page.wait_for_function("() => app.graph._nodes.length > 0")


def test_lines_stay(page: Page):
    """One page does it all: opening one takes longer than all that is tested on it."""
    page.evaluate(OPEN, workflow())
    expect(lines(page)).to_have_count(0)
    before = page.evaluate(SENT)
    page.evaluate(RUN)
    expect_lines(page, *TOLD)
    assert page.evaluate(SENT) == before
    assert not any(text in page.evaluate(SAVED) for text in TOLD)
    reload(page)
    expect_lines(page, *TOLD)
    page.evaluate(RUN)  # all of it is cached
    expect_lines(page, *TOLD)
    goes_with_its_workflow(page)
    a_cached_run_tells_a_page_that_knows_nothing(page)


def goes_with_its_workflow(page: Page) -> None:
    name = page.evaluate("() => app.extensionManager.workflow.activeWorkflow.filename")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    expect(lines(page)).to_have_count(0)
    page.locator(".workflow-label").get_by_text(name, exact=True).click()
    expect_lines(page, *TOLD)


def a_cached_run_tells_a_page_that_knows_nothing(page: Page) -> None:
    page.evaluate(FORGET)
    reload(page)
    expect(lines(page)).to_have_count(0)
    page.evaluate(RUN)
    expect_lines(page, LOADED, COMPARED)  # nothing was recorded in this run
