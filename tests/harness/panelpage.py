"""The panel as a user sees it: a page with its controls by their names."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

JOB_MILLISECONDS = 120_000
WAIT_MILLISECONDS = 60_000  # what takes a tenth of a second, while other tests have the machine

expect.set_options(timeout=WAIT_MILLISECONDS)


class PanelPage:
    """The panel in ComfyUI's page.

    Attributes:
        page: the whole page.
        root: the panel.
        models: a line for each model.
        job: the job that the panel shows.
        problem: what it says has not worked.
    """

    def __init__(self, page: Page) -> None:
        """Take a page that is ready."""
        self.page = page
        self.root = page.locator(".hswq-panel")
        self.models = self.root.locator(".hswq-model")
        self.job = self.root.locator("section[data-state]")
        self.problem = self.root.get_by_role("alert")

    def toggle(self) -> None:
        """Open or close the panel by the button in ComfyUI's action bar."""
        self.page.get_by_test_id("action-bar-buttons").get_by_role("button", name="HSWQ").click()

    def open(self) -> None:
        """Open the panel and wait until it knows something."""
        self.toggle()
        self.root.locator(".hswq-models").wait_for()

    def button(self, name: str) -> Locator:
        """Return one of its buttons."""
        return self.root.get_by_role("button", name=name, exact=True)

    def confirm(self, name: str) -> None:
        """Press one of its buttons that asks whether it is meant, and say yes."""
        self.button(name).click()
        # Not by its role, which older frontends hide from screen readers with all of the page.
        self.page.locator("[role=dialog] button").filter(has_text="Delete").click()

    def expect_samples(self, samples: int) -> None:
        """Wait until the only model has so many samples, in its line and in its bar."""
        shown = f"{samples} of 32" if samples < 32 else f"{samples} images"
        expect(self.models.locator(".hswq-fact")).to_have_text(shown)
        bar = self.root.get_by_role("progressbar", name=re.compile("^Images recorded of"))
        expect(bar).to_have_attribute("aria-valuenow", str(samples))

    def set_keep_ratio(self, ratio: float) -> None:
        """Move the slider and wait until all is of its place."""
        self.root.get_by_role("slider", name="Keep ratio").fill(str(ratio))
        self.expect_file()

    def expect_file(self) -> None:
        """Wait until what an export would write is of the chosen point."""
        expect(self.fact("file")).to_be_visible()
        expect(self.root.locator(".hswq-file")).to_have_attribute("aria-busy", "false")

    def fact(self, name: str) -> Locator:
        """Return where the panel tells something."""
        return self.root.locator(f"[data-fact={name}]")

    def unfold(self, title: str) -> None:
        """Open a folded part."""
        self.root.locator("summary", has_text=title).click()

    def choose_format(self, form: str) -> None:
        """Choose the format of an export."""
        self.root.get_by_role("combobox", name="Format").select_option(form)
        self.expect_file()

    def export(self, filename: str) -> None:
        """Fill in the form and send it."""
        self.root.get_by_role("textbox", name="File name").fill(filename)
        self.button("Export").click()

    def expect_job(self, state: str) -> None:
        """Wait until the job is pending, running, done, failed or cancelled."""
        expect(self.job).to_have_attribute("data-state", state, timeout=JOB_MILLISECONDS)

    def upload(self, name: str, content: bytes) -> None:
        """Choose a file in the dialog of the upload button."""
        file = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
        self.root.locator("input[type=file]").set_input_files([file])

    def resize(self, width: int) -> None:
        """Make the sidebar so wide, by its handle; ComfyUI has a least width."""
        handles = self.page.locator(".side-bar-panel + div, .p-splitter-gutter")  # newer, older
        handle = handles.first.bounding_box()
        x, y = handle["x"] + handle["width"] / 2, handle["y"] + 200
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(self.root.bounding_box()["x"] + width, y, steps=4)
        self.page.mouse.up()
        self.page.mouse.move(x + 100, y)

    def screenshot(self, path: Path) -> None:
        """Take a picture of the page as it is."""
        self.page.screenshot(path=path, animations="disabled")
