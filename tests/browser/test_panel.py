"""The panel's whole story, in both frontends: record, look, search, export, delete."""

from collections.abc import Iterator

import pytest
from harness.client import Client
from harness.fixtures import ENOUGH_STEPS, forget_statistics
from harness.lines import QUARTER_KEPT
from harness.panelpage import PanelPage
from harness.prompts import stock_loader, text_to_latent
from harness.server import ComfyUIServer
from playwright.sync_api import Browser, expect

from .conftest import open_page

pytestmark = pytest.mark.browser

GRAPH = "() => JSON.stringify(app.graph.serialize())"
TEXTS = """() => [...document.querySelectorAll(".hswq-panel *")]
    .filter((one) => !one.children.length).map((one) => one.textContent).filter(Boolean)"""


@pytest.fixture(params=["pinned_server", "server"], ids=["pinned", "newest"])
def host(request: pytest.FixtureRequest) -> ComfyUIServer:
    """A server with the frontend that ComfyUI pins, then one with the newest."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def panel(browser: Browser, host: ComfyUIServer) -> Iterator[PanelPage]:
    """The panel, of a server that has recorded nothing."""
    forget_statistics(host)
    with open_page(browser, host) as page:
        yield PanelPage(page)


def sample(host: ComfyUIServer, images: int) -> None:
    """Sample from elsewhere, so that only what the server tells the page can show it."""
    Client(host.url).run(
        text_to_latent(stock_loader(), batch=images, steps=ENOUGH_STEPS, seed=images)
    )


def plan_of(host: ComfyUIServer, ratio: float) -> dict:
    """Ask the server for the only model's plan."""
    client = Client(host.url)
    (model,) = client.get_json("/hswq/statistics")["models"]
    path = f"/hswq/statistics/{model['id']}/plan?mode=scaled&keep_ratio={ratio}"
    return client.get_json(path)


def shown(plan: dict) -> dict[str, str]:
    """Return what the panel should say of a plan."""
    sizes = [
        f"{float(f'{plan[key] / 2**20:.3g}'):g} MiB" for key in ("bytes_before", "bytes_after")
    ]
    error = plan["expected_error"]
    searched = f"{plan['searched']} of {plan['quantized']} layers searched"
    return {
        "kept16": f"{plan['kept']} of {plan['kept'] + plan['quantized']} layers",
        "unet": " → ".join(sizes),
        "expectedError": searched if error is None else f"{float(f'{100 * error:.3g}'):g} %",
    }


def test_from_the_first_image_to_a_file(panel: PanelPage, host: ComfyUIServer):
    graph = panel.page.evaluate(GRAPH)
    panel.open()
    expect_nothing_recorded(panel)
    watch_it_grow(panel, host)
    move_the_slider(panel, host)
    search(panel, host)
    export(panel, host)
    read_an_error(panel, host)
    delete(panel, host)
    assert panel.page.evaluate(GRAPH) == graph


def expect_nothing_recorded(panel: PanelPage) -> None:
    expect(panel.root).to_contain_text("Recording on")
    assert [text for text in panel.page.evaluate(TEXTS) if "images" in text] != []


def watch_it_grow(panel: PanelPage, host: ComfyUIServer) -> None:
    toast = panel.page.get_by_text("The HSWQ loader quantizes it from the next run on")
    sample(host, 8)
    panel.expect_samples(8)
    expect(panel.models).to_contain_text("Recording")
    expect(panel.models).to_contain_text("264 of 264 layers")
    assert toast.count() == 0
    sample(host, 32)
    panel.expect_samples(40)
    expect(panel.models).to_contain_text("Ready")
    expect(toast.first).to_be_visible()  # newer frontends have it for screen readers too


def move_the_slider(panel: PanelPage, host: ComfyUIServer) -> None:
    for ratio in (0.1, 0.5, 1, 0.25):
        panel.set_keep_ratio(ratio)
        said = panel.facts()
        said["expectedError"] = said["expectedError"].removesuffix("Search").strip()
        assert said == shown(plan_of(host, ratio))


def search(panel: PanelPage, host: ComfyUIServer) -> None:
    panel.button("Search").click()
    panel.expect_job("done")
    expect(panel.root.locator("[data-fact=expectedError]")).to_contain_text("%")
    plan = plan_of(host, 0.25)
    assert plan["searched"] == plan["quantized"]
    assert (plan["quantized"], plan["kept"]) in QUARTER_KEPT
    assert panel.facts() == shown(plan)


def export(panel: PanelPage, host: ComfyUIServer) -> None:
    panel.set_keep_ratio(0.1)
    panel.export("from_panel/first")
    panel.expect_job("done")
    expect(panel.job).to_contain_text("output/checkpoints/from_panel/first.safetensors")
    (path,) = (host.base / "output" / "checkpoints").rglob("*.*")
    assert path.name == "first.safetensors"
    assert path.stat().st_size > 1 << 20
    written = path.stat().st_mtime_ns
    panel.export("from_panel/first")
    expect(panel.job).to_contain_text("first.safetensors is there already")
    assert path.stat().st_mtime_ns == written


def read_an_error(panel: PanelPage, host: ComfyUIServer) -> None:
    panel.export("from_panel/first", "compatible")
    panel.expect_job("failed")
    expect(panel.problem).to_contain_text("first.safetensors is there already: choose another")
    panel.button("Dismiss").click()
    expect(panel.problem).to_have_count(0)
    (host.base / "output/checkpoints/from_panel/first.safetensors").unlink()


def delete(panel: PanelPage, host: ComfyUIServer) -> None:
    panel.confirm("Delete all statistics of this model")
    expect(panel.root.get_by_role("heading", name="Statistics files")).to_have_count(0)
    assert not list((host.models / "hswq").glob("*.pt"))
