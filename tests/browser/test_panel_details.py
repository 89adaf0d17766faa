"""The panel's details: files, table, settings, what it leaves behind, and who can use it."""

import re
import time
from pathlib import Path

import pytest
from harness.client import Client
from harness.fixtures import change_settings
from harness.panelpage import PanelPage
from harness.prompts import CHECKPOINT, node, stock_loader, text_to_latent
from harness.server import ComfyUIServer
from playwright.sync_api import Browser, Page, Route, expect

from .conftest import TEAPOT, open_page
from .test_examples import OPEN

pytestmark = pytest.mark.browser

IDLE_SECONDS = 6
# Listeners of ComfyUI's events that were added and not removed, from here on.
COUNT = """() => {
    const api = window.comfyAPI.api.api
    const listeners = window.listening = new Set()
    for (const [name, change] of [["addEventListener", "add"], ["removeEventListener", "delete"]]) {
        const original = api[name].bind(api)
        api[name] = (event, listen) => { listeners[change](listen); return original(event, listen) }
    }
}"""
NAMELESS = """() => [...document.querySelectorAll(".hswq-panel :is(a, button, input, select)")]
    .filter((one) => !(one.labels?.[0]?.textContent || one.textContent || one.ariaLabel).trim())
    .map((one) => one.outerHTML)"""
CONTROLS = """() => [...document.querySelectorAll(
    ".hswq-panel :is(a, button:enabled, input:enabled, select, summary, [tabindex])")].length"""
OVERFLOW = """() => [...document.querySelectorAll(".hswq-panel :not(.hswq-hidden)")]
    .filter((one) => one.getBoundingClientRect().right > document.querySelector(".hswq-panel")
        .getBoundingClientRect().right + 1 && !one.closest(".hswq-chart, .hswq-curve"))
    .map((one) => one.outerHTML.slice(0, 200))"""
# What is too small for a finger: WCAG AA asks for 24 pixels. A label belongs to its input.
SMALL = """() => [...document.querySelectorAll(
    ".hswq-panel :is(a, button, input, select, summary, [tabindex])")]
    .filter((one) => one.checkVisibility())
    .map((one) => [one, (one.closest("label") ?? one).getBoundingClientRect()])
    .filter(([, { width, height }]) => width < 24 || height < 24)
    .map(([one, { width, height }]) => `${one.outerHTML.slice(0, 99)} ${width} ${height}`)"""
# What is drawn on a point, from the front to the back, mixed as the browser mixes it.
CONTRASTS = """() => {
    const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true})
    const drawn = (colors) => {
        context.clearRect(0, 0, 1, 1)
        for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1) }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)
    }
    const light = (rgb) => rgb.map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
    const found = {}
    for (const one of document.querySelectorAll(".hswq-panel *")) {
        const hasText = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
        const style = getComputedStyle(one)
        if (!hasText || one.closest(":disabled, .hswq-hidden") || style.opacity === "0") continue
        const back = []
        for (let at = one; at; at = at.parentElement) {
            back.unshift(getComputedStyle(at).backgroundColor)
        }
        const [a, b] = [light(drawn(back)), light(drawn([...back, style.color]))]
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
        if (ratio < 4.5) found[`${one.tagName}.${one.className}: ${one.textContent}`] = ratio
    }
    return found
}"""
PALETTES = ("dark", "light", "solarized", "arc", "nord", "github")

PALETTE = "(name) => app.extensionManager.setting.set('Comfy.ColorPalette', name)"


def asked_by(page: Page) -> list[str]:
    """Return a list that gets the address of every request from here on."""
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    return addresses


class TestFiles:
    def test_come_and_go(self, panel: PanelPage, server: ComfyUIServer, statistics):
        folder, (_, content) = server.models / "hswq", statistics
        panel.open()
        panel.unfold("Statistics files")
        panel.upload("wrong.pt", b"no statistics")
        expect(panel.problem).to_contain_text("wrong.pt")
        panel.expect_samples(40)
        with panel.page.expect_download() as download:
            panel.root.get_by_role("link", name="Download").click()
        assert Path(download.value.path()).read_bytes() == content
        panel.confirm("Reset")
        expect(panel.root).to_contain_text("0 of 32 images until FP8")
        assert list(folder.glob("*.pt")) == []
        panel.upload("theirs.pt", content)
        expect(panel.root).to_contain_text("theirs.pt is taken in.")
        panel.expect_samples(40)
        assert len(list(folder.glob("*.pt"))) == 1
        expect(panel.problem).to_have_count(0)
        panel.upload("theirs.pt", content)
        expect(panel.root).to_contain_text("Nothing new: all that is in theirs.pt was here already")

    def test_a_pressed_link_stays_where_it_is(self, panel: PanelPage):
        """What is answered meanwhile stands above it: the click would be lost."""
        held: list[Route] = []
        panel.page.route("**/curves", lambda route: held.append(route))
        panel.open()
        panel.unfold("Statistics files")
        panel.root.get_by_role("link", name="Download").hover()
        while not held:
            panel.page.wait_for_timeout(50)
        panel.page.mouse.down()
        with panel.page.expect_response("**/curves"):
            held.pop().continue_()
        panel.page.wait_for_timeout(500)
        expect(panel.button("Export")).to_have_count(0)
        with panel.page.expect_download():
            panel.page.mouse.up()
        expect(panel.button("Export")).to_be_visible()


class TestTable:
    def test_is_sorted_and_searched(self, panel: PanelPage):
        panel.open()
        panel.resize(700)
        panel.unfold("Layers")
        table = panel.root.get_by_role("table")
        layers = table.locator("tbody th")
        expect(layers).to_have_count(264)
        assert self.sensitivities(panel) == sorted(self.sensitivities(panel), reverse=True)
        table.get_by_role("button", name="Sensitivity").click()
        heading = table.locator("thead th", has_text="Sensitivity")
        expect(heading).to_have_attribute("aria-sort", "ascending")
        assert self.sensitivities(panel) == sorted(self.sensitivities(panel))
        panel.root.get_by_role("searchbox", name="Find").fill("attn2.to_v 16 bit")
        expect(panel.root.locator("p[role=status]")).to_have_text(re.compile(r"^\d of 264 layers"))
        found = table.locator("tbody tr").all_inner_texts()
        assert found
        assert all("attn2.to_v" in row and "16 bit" in row for row in found)

    def sensitivities(self, panel: PanelPage) -> list[float]:
        cells = panel.root.locator("tbody td:nth-of-type(2)").all_inner_texts()
        return [float(cell) for cell in cells]


class TestPlan:
    def test_tells_the_error_as_soon_as_anybody_has_searched(
        self, panel: PanelPage, server: ComfyUIServer
    ):
        panel.open()
        source = f"checkpoints/{CHECKPOINT}"
        expect(panel.root).to_contain_text("The error is not known yet.")
        Client(server.url).run(
            {"plan": node("HSWQPlan", source=source, statistics="auto", mode="scaled")}
        )
        expect(panel.fact("sentence")).to_have_text(re.compile(r", error [\d.]+%, 40 images, FP8$"))


class TestRecording:
    def test_is_comfyuis_setting(self, panel: PanelPage, server: ComfyUIServer):
        panel.open()
        switch = panel.root.get_by_role("switch")
        expect(switch).to_be_checked()
        switch.click()
        expect(panel.root).to_contain_text("Recording off")
        expect(panel.root).to_contain_text("Ready.")  # it still is
        expect(switch).not_to_be_checked()
        self.expect_setting(server, False)
        panel.page.evaluate("app.extensionManager.setting.set('HSWQ.Record', true)")
        expect(switch).to_be_checked()
        self.expect_setting(server, True)

    def expect_setting(self, server: ComfyUIServer, value: bool) -> None:
        end = time.monotonic() + 30
        while Client(server.url).get_json("/settings")["HSWQ.Record"] is not value:
            assert time.monotonic() < end, f"the setting does not become {value}"
            time.sleep(0.05)


class TestManners:
    def test_idle_asks_nothing_and_closed_leaves_nothing(self, panel: PanelPage):
        panel.page.evaluate(COUNT)
        panel.open()
        panel.expect_samples(40)
        panel.expect_file()
        assert panel.page.evaluate("window.listening.size") > 0
        asked = asked_by(panel.page)
        time.sleep(IDLE_SECONDS)
        assert [url for url in asked if re.search("hswq|jobs|queue|prompt", url)] == []
        panel.toggle()
        expect(panel.root).to_have_count(0)
        assert panel.page.evaluate("window.listening.size") == 0


class TestAccess:
    def test_by_keyboard(self, panel: PanelPage):
        panel.page.keyboard.press("Shift+Q")
        panel.expect_samples(40)
        panel.expect_file()
        assert panel.page.evaluate(NAMELESS) == []
        panel.root.get_by_role("switch").focus()
        reached = "document.activeElement.closest('.hswq-panel') !== null"
        for _ in range(panel.page.evaluate(CONTROLS) - 1):
            panel.page.keyboard.press("Tab")
            assert panel.page.evaluate(reached)
        panel.page.keyboard.press("Tab")
        assert not panel.page.evaluate(reached)

    def test_by_finger(self, panel: PanelPage):
        panel.open()
        panel.expect_file()
        for name in ("Layers", "Statistics files"):
            panel.unfold(name)
        panel.button("Settings").click()
        panel.upload("wrong.pt", b"no statistics")
        expect(panel.problem).to_have_count(1)
        expect(panel.root.locator("tbody tr").first).to_be_visible()
        assert panel.page.evaluate(SMALL) == []

    def test_in_japanese(self, recorded: None, browser: Browser, server: ComfyUIServer):
        change_settings(server, {"Comfy.Locale": "ja"})
        try:
            with open_page(browser, server) as page:
                self.expect_japanese(PanelPage(page))
        finally:
            change_settings(server, {"Comfy.Locale": "en"})

    def expect_japanese(self, panel: PanelPage) -> None:
        panel.toggle()
        expect(panel.models).to_contain_text("40 枚")
        expect(panel.fact("sentence")).to_contain_text("MiB、40 枚、FP8")
        expect(panel.root.get_by_role("heading", name="エクスポート")).to_be_visible()
        panel.unfold("層")
        why = panel.root.locator("tbody td[data-kept=true]").first
        expect(why).to_have_text("16 ビット 感度")
        expect(why).to_have_attribute("title", re.compile("感度が最も高い層の 1 つ"))


class TestLook:
    def test_of_every_width_in_both_themes(self, panel: PanelPage, tmp_path: Path):
        page = panel.page
        page.evaluate(OPEN, "hswq_first_use")
        page.evaluate("app.canvas.ds.offset[0] += 420")  # so that the panel covers nothing
        panel.open()
        panel.expect_samples(40)
        panel.button("Search").click()
        panel.expect_job("done")
        panel.button("Dismiss").click()
        panel.unfold("Layers")
        for width, height in ((700, 2000), (320, 2000), (440, 900)):
            page.set_viewport_size({"width": 1440, "height": height})
            panel.resize(width)
            for palette in ("light", "dark"):
                page.evaluate(PALETTE, palette)
                panel.screenshot(tmp_path / f"{palette}-{width}.jpg")
            assert page.evaluate(OVERFLOW) == []

    def test_can_be_read_in_every_palette(self, panel: PanelPage):
        """WCAG AA asks for 4.5 to 1."""
        panel.open()
        panel.expect_file()
        for name in ("Layers", "Statistics files"):
            panel.unfold(name)
        panel.button("Settings").click()
        expect(panel.root.locator("tbody tr").first).to_be_visible()
        try:
            for palette in PALETTES:
                panel.page.evaluate(PALETTE, palette)
                panel.page.wait_for_timeout(200)  # ComfyUI sets its colours one by one
                assert panel.page.evaluate(CONTRASTS) == {}, palette
        finally:
            panel.page.evaluate(PALETTE, "dark")


def test_an_error_of_a_question_ends_when_it_is_asked_again(panel: PanelPage, server):
    """As of a model whose statistics another tab has deleted."""
    wrong = {"status": TEAPOT, "json": {"error": "there are no statistics of this model"}}
    panel.page.route("**/curves", lambda route: route.fulfill(**wrong))
    panel.open()
    expect(panel.problem).to_contain_text("there are no statistics of this model")
    panel.page.unroute("**/curves")
    Client(server.url).run(text_to_latent(stock_loader(), steps=1))  # tells of a change
    panel.expect_samples(41)
    expect(panel.problem).to_have_count(0)
