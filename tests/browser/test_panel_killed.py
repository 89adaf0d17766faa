"""A server that is killed and started anew, whatever the panel is doing; and two tabs at once."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from harness.client import Client
from harness.panelpage import PanelPage
from harness.prompts import stock_loader, text_to_latent
from harness.server import ComfyUIServer
from playwright.sync_api import Browser, Page, Request, expect

from .conftest import READY
from .test_panel import measure_effects
from .test_panel_jobs import busy, exported, large

__all__ = ["busy", "large"]
pytestmark = pytest.mark.browser


def start_measuring(panel: PanelPage) -> None:
    panel.button("Measure effect …").click()
    panel.button("Start").click()


def start_exporting(panel: PanelPage) -> None:
    panel.export("killed")


# One that samples, and one that writes a file: to start ComfyUI anew takes a while.
STARTS = {"Measure effect": start_measuring, "Export": start_exporting}


class TestKilled:
    def test_while_a_job_runs(self, large: PanelPage, server: ComfyUIServer):
        """It is lost, and can be done again; nothing of it is left, and nothing else is lost."""
        for samples, name in enumerate(STARTS, 41):
            Client(server.url).run(text_to_latent(stock_loader(), steps=1))
            large.expect_samples(samples)
            large.expect_file()
            self.kill_while(large, server, name)
            large.expect_samples(samples)
            large.expect_file()
            # A hidden one is removed by the first start that comes a minute later.
            assert [name for name in exported(server) if not name.startswith(".")] == []

    def kill_while(self, large: PanelPage, server: ComfyUIServer, name: str) -> None:
        STARTS[name](large)
        bar = large.job.get_by_role("progressbar", name=name)
        expect(bar).to_have_attribute("aria-valuenow", re.compile(r"[1-9]\d?"))
        with server.killed():
            expect(large.problem).to_contain_text("ComfyUI does not answer")
            expect(large.job).to_contain_text(f"{name}: ComfyUI does not answer")
            expect(large.button("Export")).to_be_disabled()
        expect(large.problem).to_have_count(0)
        large.expect_job("lost")
        expect(large.button("Export")).to_be_enabled()
        large.button("Dismiss").click()

    def test_while_it_records_and_a_question_is_open(
        self, panel: PanelPage, busy: Client, server: ComfyUIServer
    ):
        """What is asked is answered by the new server; the sampling does not count."""
        panel.open()
        expect(panel.models).to_contain_text("step")
        panel.unfold("Statistics files")
        panel.button("Reset").click()
        gone = panel.root.get_by_text("ComfyUI does not answer")  # no role: the question hides it
        asked = unanswered(panel.page)
        with server.killed():
            expect(gone).to_be_visible()
            expect(panel.root.locator(".hswq-live")).to_have_count(0)
        expect(gone).to_have_count(0)
        expect(panel.models).to_have_count(1)
        while asked:  # else the answer may come when there is nothing to tell any more
            panel.page.wait_for_timeout(100)
        panel.page.locator("[role=dialog] button").filter(has_text="Delete").click()
        expect(panel.root).to_contain_text("0 of 32 images until FP8")
        assert list((server.models / "hswq").glob("*.pt")) == []


def unanswered(page: Page) -> set[Request]:
    """Return the questions to our routes that are not answered, as a set that stays up to date."""
    asked: set[Request] = set()
    page.on("request", lambda one: asked.add(one) if "/hswq/" in one.url else None)
    for end in ("requestfinished", "requestfailed"):
        page.on(end, lambda one: asked.discard(one))  # it takes no built-in method
    return asked


@pytest.fixture
def tabs(browser: Browser, panel: PanelPage, server: ComfyUIServer) -> Iterator[list[PanelPage]]:
    """Two tabs of one browser, in each the panel."""
    context = browser.new_context(viewport={"width": 1680, "height": 900})
    pages = [opened(context.new_page(), server) for _ in range(2)]
    yield pages
    context.close()


def opened(page: Page, server: ComfyUIServer) -> PanelPage:
    page.goto(server.url)
    page.wait_for_function(READY)
    panel = PanelPage(page)
    panel.open()
    panel.expect_file()
    return panel


class TestTabs:
    def test_see_what_the_other_does(
        self, large: PanelPage, tabs: list[PanelPage], server: ComfyUIServer
    ):
        one, other = tabs
        one.button("Search").click()
        for tab in tabs:
            tab.expect_job("done")
            expect(tab.fact("sentence")).to_contain_text("error")
        self.cancel_what_the_other_tab_does(one, other, server)
        measure_effects(server)
        Client(server.url).run(text_to_latent(stock_loader(), steps=1))  # tells of a change
        for tab in tabs:
            expect(tab.button("by effect")).to_be_visible()
        other.unfold("Statistics files")
        other.confirm("Delete all statistics of this model")
        expect(one.models).to_have_count(0)
        expect(one.job).to_have_attribute("data-state", "cancelled")
        other.job.get_by_role("button", name="Dismiss").click()
        expect(one.job).to_have_count(0)
        expect(one.problem).to_have_count(0)

    def cancel_what_the_other_tab_does(
        self, one: PanelPage, other: PanelPage, server: ComfyUIServer
    ) -> None:
        one.export("by_a_tab")
        bar = other.job.get_by_role("progressbar", name="Export")
        expect(bar).to_have_attribute("aria-valuenow", re.compile(r"[1-9]\d?"))
        expect(other.button("Export")).to_be_disabled()
        other.button("Cancel").click()
        for tab in (one, other):
            tab.expect_job("cancelled")
        assert exported(server) == []
