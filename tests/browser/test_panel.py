"""The panel's whole story, in both frontends: record, look, search, export, delete."""

import hashlib
import json
import re
import urllib.parse

import pytest
from harness.client import Client
from harness.fixtures import small_sampling
from harness.lines import QUARTER_KEPT, sentence
from harness.panelpage import PanelPage
from harness.prompts import CHECKPOINT, stock_loader
from harness.server import ComfyUIServer
from hswq.calibration import load_statistics
from playwright.sync_api import Page, Route, expect

pytestmark = pytest.mark.browser

GRAPH = "() => JSON.stringify(app.graph.serialize())"
LOADER = """() => {
    const node = app.graph._nodes.find((one) => one.type === "HSWQCheckpointLoader")
    const names = ["ckpt_name", "mode", "keep_ratio"]
    return node ? names.map((name) => node.widgets.find((one) => one.name === name).value) : null
}"""
WIDGETS = """() => app.graph._nodes.find((one) => one.type === "HSWQCheckpointLoader")
    .widgets.map(({ name, value }) => ({ name, value }))"""
SELECTED = "() => Object.values(app.canvas.selected_nodes).map((node) => node.type)"
UNDO = "() => app.extensionManager.command.execute('Comfy.Undo')"


@pytest.fixture
def panel(client: Client, page: Page) -> PanelPage:
    """The panel, of a server that has recorded nothing."""
    return PanelPage(page)


def sample(server: ComfyUIServer, images: int) -> None:
    """Sample from elsewhere, so that only what the server tells the page can show it."""
    Client(server.url).run(small_sampling(stock_loader(), images, seed=images))


def ask(server: ComfyUIServer, rest: str) -> dict:
    """Ask the server about the only model."""
    client = Client(server.url)
    (model,) = client.get_json("/hswq/statistics")["models"]
    return client.get_json(f"/hswq/statistics/{model['id']}/{rest}".rstrip("/"))


def plan_of(server: ComfyUIServer, ratio: float) -> dict:
    """Ask for the only model's plan."""
    return ask(server, f"plan?mode=scaled&keep_ratio={ratio}")


def file_of(server: ComfyUIServer, ratio: float, form: str = "scaled") -> dict:
    """Ask what an export would write."""
    query = {"format": form, "what": "full checkpoint", "keep_ratio": ratio}
    return ask(server, f"export?{urllib.parse.urlencode(query)}")


def test_from_the_first_image_to_a_file(panel: PanelPage, server: ComfyUIServer):
    graph = panel.page.evaluate(GRAPH)
    panel.open()
    expect_nothing_recorded(panel)
    watch_it_grow(panel, server)
    move_the_slider(panel, server)
    search(panel, server)
    drag_the_point(panel)
    export(panel, server)
    read_an_error(panel, server)
    assert panel.page.evaluate(GRAPH) == graph
    apply(panel, graph)
    delete(panel, server)


def expect_nothing_recorded(panel: PanelPage) -> None:
    expect(panel.root).to_contain_text("Recording on")
    expect(panel.root).to_contain_text("Nothing is recorded yet")


def watch_it_grow(panel: PanelPage, server: ComfyUIServer) -> None:
    toast = panel.page.get_by_text("The HSWQ loader quantizes it from the next run on")
    sample(server, 8)
    panel.expect_samples(8)
    expect(panel.root).to_contain_text("8 of 32 images until FP8")
    expect(panel.fact("coverage")).to_have_text("264 of 264")
    assert toast.count() == 0
    sample(server, 32)
    panel.expect_samples(40)
    expect(panel.root).to_contain_text("Not on")
    expect(panel.root).to_contain_text("Ready. An HSWQ loader makes it FP8 in its next run.")
    expect(toast.first).to_contain_text("MiB, 40 images, FP8")


def move_the_slider(panel: PanelPage, server: ComfyUIServer) -> None:
    for ratio in (0.1, 1, 0.25):
        panel.set_keep_ratio(ratio)
        plan = plan_of(server, ratio)
        expect(panel.fact("sentence")).to_have_text(sentence(plan["outcome"]))
        kept = f"{plan['kept']} of {plan['kept'] + plan['quantized']} layers stay in 16 bit"
        expect(panel.root).to_contain_text(kept)


def search(panel: PanelPage, server: ComfyUIServer) -> None:
    panel.button("Search").click()
    panel.expect_job("done")
    expect(panel.fact("sentence")).to_contain_text(re.compile(r"error [\d.]+%"))
    expect(panel.button("Search")).to_have_count(0)
    plan = plan_of(server, 0.25)
    assert plan["searched"] == plan["quantized"]
    assert (plan["quantized"], plan["kept"]) in QUARTER_KEPT
    expect(panel.fact("sentence")).to_have_text(sentence(plan["outcome"]))


def drag_the_point(panel: PanelPage) -> None:
    """By mouse and by keys: the slider goes along, and so does what is said."""
    point = panel.root.get_by_role("slider", name="Point on the curve")
    box = panel.root.locator(".hswq-plot").bounding_box()
    mouse = panel.page.mouse
    mouse.move(box["x"] + 5, box["y"] + 20)
    mouse.down()
    for share in (0.2, 0.5, 1.2):
        mouse.move(box["x"] + share * box["width"], box["y"] + 60)
    mouse.up()
    expect(point).to_have_attribute("aria-valuenow", "100")
    expect(panel.fact("sentence")).to_contain_text("error 0.0%")
    mouse.move(box["x"], box["y"])  # no longer held
    expect(point).to_be_focused()
    for key, value in (("Home", 0), ("PageUp", 10), ("ArrowRight", 11), ("ArrowLeft", 10)):
        panel.page.keyboard.press(key)
        expect(point).to_have_attribute("aria-valuenow", str(value))
    expect(panel.root.get_by_role("slider", name="Keep ratio")).to_have_value("0.1")
    said = panel.fact("sentence").inner_text()
    expect(point).to_have_attribute("aria-valuetext", said)


def export(panel: PanelPage, server: ComfyUIServer) -> None:
    """What was said before is what is written, to the byte."""
    panel.set_keep_ratio(0.1)
    told = file_of(server, 0.1)
    expect(panel.fact("file")).to_have_text(sentence(told["outcome"]))
    panel.export("from_panel/first")
    panel.expect_job("done")
    expect(panel.job).to_contain_text("output/checkpoints/from_panel/first.safetensors")
    expect(panel.job).to_contain_text(sentence(told["outcome"]))
    (path,) = (server.base / "output" / "checkpoints").rglob("*.*")
    assert path.name == "first.safetensors"
    assert path.stat().st_size == told["bytes"]
    written = path.stat().st_mtime_ns
    panel.export("from_panel/first")
    expect(panel.job).to_contain_text("first.safetensors is there already")
    assert path.stat().st_mtime_ns == written
    offered = "Object.values(LiteGraph.registered_node_types.CheckpointLoaderSimple.nodeData"
    has = f"{offered}.input.required.ckpt_name).flat(2).join().includes('from_panel/first')"
    panel.page.wait_for_function(has)  # without a reload of the page


def read_an_error(panel: PanelPage, server: ComfyUIServer) -> None:
    """Nothing is written over another file: the mode's own format is offered."""
    panel.button("compatible (V1)").click()
    expect(panel.root.get_by_role("combobox", name="Format")).to_have_value("compatible")
    panel.expect_file()
    panel.export("from_panel/first")
    panel.expect_job("failed")
    expect(panel.problem).to_contain_text("first.safetensors is there already: choose another")
    panel.button("Dismiss").click()
    expect(panel.problem).to_have_count(0)
    panel.button("scaled (V2)").click()
    (server.base / "output/checkpoints/from_panel/first.safetensors").unlink()


def apply(panel: PanelPage, graph: str) -> None:
    """The first time puts a loader in, the second time sets it; each can be undone."""
    panel.button("Apply to loader").click()
    expect(panel.root).to_contain_text("is new in your graph")
    assert panel.page.evaluate(LOADER) == [CHECKPOINT, "scaled", 0.1]
    panel.set_keep_ratio(0.5)
    panel.button("Apply to loader").click()
    expect(panel.root).to_contain_text("is set to sd_xl_base_1.0.safetensors")
    assert panel.page.evaluate(LOADER) == [CHECKPOINT, "scaled", 0.5]
    panel.button("Show node").click()
    assert panel.page.evaluate(SELECTED) == ["HSWQCheckpointLoader"]
    panel.page.evaluate(UNDO)
    panel.page.wait_for_function(f"() => ({LOADER})()?.[2] === 0.1")
    panel.page.evaluate(UNDO)
    panel.page.wait_for_function(f"() => ({LOADER})() === null")


def delete(panel: PanelPage, server: ComfyUIServer) -> None:
    panel.unfold("Statistics files")
    panel.confirm("Delete all statistics of this model")
    expect(panel.models).to_have_count(0)
    assert not list((server.models / "hswq").glob("*.pt"))


def test_a_point_by_effect_is_applied_and_exported(
    recorded: None, server: ComfyUIServer, page: Page
):
    measure_effects(server)
    take_a_small_card(page)
    panel = PanelPage(page)
    panel.open()
    expect(panel.root.get_by_text("fits this card: 10.0 MiB", exact=True)).to_be_visible()
    panel.button("by effect").click()
    expect(panel.root).to_contain_text("For this model, by effect is better at")
    panel.root.get_by_role("slider", name="Keep MiB").fill("0.5")
    panel.expect_file()
    panel.button("Apply to loader").click()
    expect(panel.root).to_contain_text("Ctrl+Z takes it back")
    loader = {one["name"]: one["value"] for one in page.evaluate(WIDGETS)}
    assert (loader["selection"], loader["fit_gb"]) == ("by effect", 0)
    expect(panel.root.locator("output")).to_have_text(f"{loader['keep_mb']} MiB")
    query = {"format": "scaled", "what": "full checkpoint", "keep_mb": loader["keep_mb"]}
    told = ask(server, f"export?{urllib.parse.urlencode(query)}")
    expect(panel.fact("file")).to_have_text(sentence(told["outcome"]))
    panel.export("by_effect")
    panel.expect_job("done")
    (path,) = (server.base / "output" / "checkpoints").rglob("by_effect.safetensors")
    assert path.stat().st_size == told["bytes"]


def take_a_small_card(page: Page) -> None:
    """Let the server's answer be that of a machine that has no room for all of the toy."""

    def answer(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, json={**response.json(), "fits": 10 << 20})

    page.route("**/curves", answer)


def measure_effects(server: ComfyUIServer) -> None:
    """Keep effects as HSWQ Measure Effect does, of which deeper layers have more."""
    (path,) = (server.models / "hswq").glob("*.recorded.pt")
    its, rows = load_statistics(path).meta["fingerprint"], ask(server, "")["rows"]
    layers = {row["layer"]: 1.0 + place for place, row in enumerate(rows)}
    content = {"version": 1, "fingerprint": its, "of": "", "whole": True, "layers": layers}
    text = json.dumps(content)
    target = server.models / "hswq" / "effects" / f"{its[:16]}.scaled.whole.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
