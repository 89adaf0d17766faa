"""The panel's jobs: what ComfyUI's queue does with them is what the panel says."""

import re
import time
from collections.abc import Iterator

import pytest
from harness.client import Client
from harness.large import add_zeros
from harness.panelpage import PanelPage
from harness.prompts import CHECKPOINT, stock_loader, text_to_latent
from harness.server import ComfyUIServer
from playwright.sync_api import expect

from .conftest import READY

pytestmark = pytest.mark.browser

STEPS = 10_000
"""Of a sampling that does not end by itself."""


@pytest.fixture
def large(panel: PanelPage, server: ComfyUIServer) -> Iterator[PanelPage]:
    """The panel, open, of a checkpoint that takes a while to export."""
    checkpoint = server.models / "checkpoints" / CHECKPOINT
    small = checkpoint.with_suffix(".aside")
    checkpoint.rename(small)
    add_zeros(small, checkpoint)
    try:
        panel.open()
        panel.expect_samples(40)
        yield panel
    finally:
        small.replace(checkpoint)


@pytest.fixture
def busy(panel: PanelPage, server: ComfyUIServer) -> Iterator[Client]:
    """A user whose sampling keeps the queue waiting, until he interrupts it."""
    client = Client(server.url)
    prompt = text_to_latent(stock_loader(), steps=STEPS)
    client.post("/prompt", {"prompt": prompt})
    yield client
    client.interrupt()
    wait_for_queue(client)


def wait_for_queue(client: Client) -> None:
    end = time.monotonic() + 60
    while any(client.get_json("/queue").values()):
        assert time.monotonic() < end, "the queue does not become empty"
        time.sleep(0.1)


def exported(server: ComfyUIServer) -> list[str]:
    """Return the names of all files that exports have left, whole or not, and delete them."""
    files = [path for path in (server.base / "output" / "checkpoints").rglob("*") if path.is_file()]
    for path in files:
        path.unlink()
    return sorted(path.name for path in files)


class TestCancel:
    def test_while_it_runs_leaves_no_file(self, large: PanelPage, server: ComfyUIServer):
        large.export("cancelled")
        bar = large.job.get_by_role("progressbar", name="Export")
        expect(bar).to_have_attribute("aria-valuenow", re.compile(r"[1-9]\d?"))
        large.button("Cancel").click()
        large.expect_job("cancelled")
        assert exported(server) == []

    def test_while_it_waits_leaves_no_job(
        self, busy: Client, panel: PanelPage, server: ComfyUIServer
    ):
        panel.open()
        panel.export("cancelled")
        panel.expect_job("pending")
        panel.button("Cancel").click()
        panel.expect_job("cancelled")
        busy.interrupt()
        wait_for_queue(busy)
        assert exported(server) == []


class TestReload:
    def test_in_the_middle_of_an_export_goes_on(
        self, large: PanelPage, busy: Client, server: ComfyUIServer
    ):
        large.export("reloaded")
        large.expect_job("pending")  # before ComfyUI has answered
        large.page.wait_for_function("localStorage.getItem('HSWQ.job')")
        self.reload(large)
        large.expect_job("pending")
        busy.interrupt()
        bar = large.job.get_by_role("progressbar", name="Export")
        expect(bar).to_have_attribute("aria-valuenow", re.compile(r"[1-9]\d?"))
        large.expect_job("done")
        expect(large.job).to_contain_text("output/checkpoints/reloaded.safetensors")
        self.reload(large)
        large.expect_job("done")
        large.button("Dismiss").click()
        expect(large.job).to_have_count(0)
        assert large.page.evaluate("localStorage.getItem('HSWQ.job')") is None
        assert exported(server) == ["reloaded.safetensors"]

    def reload(self, panel: PanelPage) -> None:
        panel.page.reload()
        panel.page.wait_for_function(READY)
        panel.open()


class TestErrors:
    def test_of_the_node_are_shown(self, panel: PanelPage, server: ComfyUIServer):
        panel.open()
        panel.export("../outside")
        panel.expect_job("failed")
        expect(panel.problem).to_contain_text("the filename must be letters, digits")
        assert exported(server) == []

    def test_a_renamed_file_is_found_again(self, panel: PanelPage, server: ComfyUIServer):
        panel.open()
        panel.expect_file()
        checkpoint = server.models / "checkpoints" / CHECKPOINT
        moved = checkpoint.rename(checkpoint.with_name("renamed.safetensors"))
        try:
            panel.export("after_renaming")
            panel.expect_job("done")
            expect(panel.models).to_contain_text("renamed")
        finally:
            moved.rename(checkpoint)
        assert exported(server) == ["after_renaming.safetensors"]

    def test_a_deleted_file_is_named(self, panel: PanelPage, server: ComfyUIServer):
        panel.open()
        panel.expect_file()
        checkpoint = server.models / "checkpoints" / CHECKPOINT
        moved = checkpoint.rename(checkpoint.with_suffix(".aside"))
        try:
            panel.export("refused")
            expect(panel.problem).to_contain_text(f"The file of {CHECKPOINT} is no longer in")
        finally:
            moved.rename(checkpoint)
        assert Client(server.url).get_json("/queue") == {"queue_running": [], "queue_pending": []}


class TestSampling:
    def test_is_live_and_says_when_it_does_not_count(self, panel: PanelPage, busy: Client):
        panel.open()
        live = panel.root.locator(".hswq-live")
        expect(live).to_contain_text(re.compile(rf"step \d+ of {STEPS}"))
        expect(live).to_contain_text("image 41")
        expect(panel.models).to_contain_text(re.compile(rf"step \d+ of {STEPS}"))
        busy.interrupt()
        expect(live).to_have_count(0)
        expect(panel.root).to_contain_text("The last sampling was interrupted or failed.")
        panel.expect_samples(40)

    def test_of_a_deleted_model_does_not_bring_it_back(self, panel: PanelPage, busy: Client):
        panel.open()
        expect(panel.root.locator(".hswq-live")).to_have_count(1)
        panel.unfold("Statistics files")
        panel.confirm("Delete all statistics of this model")
        expect(panel.models).to_have_count(0)
        busy.interrupt()
        wait_for_queue(busy)
        expect(panel.models).to_have_count(0)
