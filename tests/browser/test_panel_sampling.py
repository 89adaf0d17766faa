"""Jobs of the panel that sample as the user did: measuring effects, and verifying pictures."""

import hashlib
import json
import re

import pytest
from harness.client import Client
from harness.http import JSON, Connection
from harness.panelpage import PanelPage
from harness.prompts import CHECKPOINT, Prompt, node, numbered, stock_loader, text_to_latent
from harness.server import ComfyUIServer
from playwright.sync_api import Locator, expect

pytestmark = pytest.mark.browser

LAST = """async (file) => {
    const { lastSampling } = await import("/extensions/hswq/panel/workflow.mjs")
    return lastSampling(file)
}"""
WIDTH = "(image) => image.naturalWidth"


@pytest.fixture
def sampled(panel: PanelPage, server: ComfyUIServer) -> PanelPage:
    """The panel, open, of a user whose last workflow has sampled its model."""
    Client(server.url).run(text_to_latent(stock_loader(), batch=2, steps=3, seed=7))
    panel.open()
    panel.expect_file()
    return panel


def look_at(panel: PanelPage, name: str) -> Locator:
    """Open what a job will do, and return it."""
    panel.button(f"{name} …").click()
    return panel.root.get_by_role("form", name=name)


def almost_done(server: ComfyUIServer) -> None:
    """Let a cancelled measuring have gone on to the last layers. Those have most effect."""
    (path,) = (server.models / "hswq" / "effects").glob("*.begun.json")
    content = json.loads(path.read_text().split("\n", 1)[1])
    (model,) = Client(server.url).get_json("/hswq/statistics")["models"]
    rows = Client(server.url).get_json(f"/hswq/statistics/{model['id']}")["rows"]
    content["layers"] |= {row["layer"]: 1e-9 * place for place, row in enumerate(rows[:-8])}
    text = json.dumps(content)
    path.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


class TestEffect:
    def test_is_measured_and_the_better_selection_offered(
        self, sampled: PanelPage, server: ComfyUIServer
    ):
        task = look_at(sampled, "Measure effect")
        expect(task).to_contain_text("“a lighthouse in a storm”, 64\u00d764, 3 steps, cfg 5")
        expect(task).to_contain_text(re.compile(r"Time: about \d+ (sec|min), or less"))
        expect(task).to_contain_text("15.9 MiB of weights")
        task.get_by_role("button", name="Start").click()
        expect(task).to_have_count(0)
        bar = sampled.job.get_by_role("progressbar", name="Measure effect")
        expect(bar).to_have_attribute("aria-valuenow", re.compile(r"[1-9]\d?"))
        sampled.button("Cancel").click()
        sampled.expect_job("cancelled")
        expect(sampled.job).to_contain_text("What was measured is kept")
        almost_done(server)
        look_at(sampled, "Measure effect").get_by_role("button", name="Start").click()
        sampled.expect_job("done")
        expect(sampled.job).to_contain_text("The curve has a line by effect. It took")
        sampled.button("Choose by effect").click()
        line = sampled.button("by effect")
        expect(line).to_have_attribute("aria-pressed", "true")
        sampled.expect_file()
        images = Client(server.url).get_json("/hswq/status")["models"][0]["samples"]
        assert images == 42  # measuring is not recorded


class TestVerify:
    def test_says_its_verdict_and_shows_the_pictures(
        self, sampled: PanelPage, server: ComfyUIServer
    ):
        sampled.set_keep_ratio(0.1)
        task = look_at(sampled, "Verify")
        task.get_by_role("spinbutton", name="Pictures").fill("2")
        task.get_by_role("button", name="Start").click()
        sampled.expect_job("done")
        expect(sampled.job).to_contain_text("2 of 2 pictures are the same")
        expect(sampled.job).to_contain_text(re.compile(r"mean PSNR \d\d\.\d dB; worst seed [78]:"))
        (inputs,) = (
            one["inputs"] for one in last_prompt(server) if one["class_type"] == "HSWQVerify"
        )
        assert (inputs["seed"], inputs["steps"], inputs["cfg"]) == (7, 3, 5)
        (loader,) = (
            one["inputs"]
            for one in last_prompt(server)
            if one["class_type"] == "HSWQCheckpointLoader"
        )
        assert (loader["keep_ratio"], loader["mode"]) == (0.1, "scaled")
        self.look_at_the_sheet(sampled)
        sampled.page.reload()
        sampled.open()
        expect(sampled.job).to_contain_text("2 of 2 pictures are the same")

    def look_at_the_sheet(self, panel: PanelPage) -> None:
        small = panel.job.get_by_role("button", name="2 of 2 pictures are the same")
        expect(small.get_by_role("img")).to_have_attribute("alt", re.compile("the worst first"))
        assert small.get_by_role("img").evaluate(WIDTH) == 3 * (64 + 4)
        small.press("Enter")
        large = panel.page.get_by_role("dialog", name="A row for each picture")
        expect(large.get_by_role("img")).to_be_visible()
        panel.page.keyboard.press("Escape")
        expect(large).to_have_count(0)
        expect(small).to_be_focused()


def last_prompt(server: ComfyUIServer) -> list[dict]:
    """Return the nodes of the last run, whoever queued it."""
    (run,) = Client(server.url).get_json("/history?max_items=1").values()
    return list(run["prompt"][2].values())


def custom_sampler(prompt: Prompt) -> Prompt:
    """Return the same sampling with ComfyUI's custom sampler and a picture at the end."""
    sampled = {key: value for key, value in prompt.items() if key not in ("sampler", "save")}
    return {
        **sampled,
        "noise": node("RandomNoise", noise_seed=11),
        "guider": node(
            "CFGGuider",
            model=["loader", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            cfg=3.0,
        ),
        "which": node("KSamplerSelect", sampler_name="heun"),
        "sigmas": node(
            "BasicScheduler", model=["loader", 0], scheduler="simple", steps=2, denoise=1.0
        ),
        "custom": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["which", 0],
            sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
        "decoded": node("VAEDecode", samples=["custom", 0], vae=["loader", 2]),
        "shown": node("PreviewImage", images=["decoded", 0]),
    }


def wait_for_run(panel: PanelPage, seed: int) -> None:
    """Wait until the history has a run: ComfyUI tells of its end before that."""
    panel.page.wait_for_function(
        f"async (file) => (await ({LAST})(file))?.seed === {seed}", arg=CHECKPOINT
    )


class TestLastWorkflow:
    def test_is_understood(self, panel: PanelPage, server: ComfyUIServer):
        self.of_a_custom_sampler(panel, server)
        self.is_the_first_pass_of_several(panel, server)

    def of_a_custom_sampler(self, panel: PanelPage, server: ComfyUIServer) -> None:
        Client(server.url).run(custom_sampler(text_to_latent(stock_loader(), batch=2)))
        wait_for_run(panel, seed=11)
        found = panel.page.evaluate(LAST, CHECKPOINT)
        assert (found["cfg"], found["seed"], found["steps"]) == (3, 11, 2)
        assert (found["sampler_name"], found["scheduler"]) == ("heun", "simple")
        assert (found["positive"], found["vae"]) == (["positive", 0], ["loader", 2])
        assert (found["width"], found["height"], found["batch"]) == (64, 64, 2)
        assert set(found["nodes"]) == {"loader", "positive", "negative", "empty"}
        assert found["nodes"]["empty"]["inputs"]["batch_size"] == 1
        assert found["runSeconds"] > 0

    def is_the_first_pass_of_several(self, panel: PanelPage, server: ComfyUIServer) -> None:
        prompt = text_to_latent(stock_loader(), seed=5)
        second = {**prompt["sampler"]["inputs"], "latent_image": ["sampler", 0], "seed": 6}
        save = node("SaveLatent", samples=["second", 0], filename_prefix="latents/test")
        both = {"second": node("KSampler", **{**second, "denoise": 0.5}), **prompt, "save": save}
        Client(server.url).run(both)
        wait_for_run(panel, seed=5)

    def test_of_another_model_does_not_count(self, panel: PanelPage, server: ComfyUIServer):
        connection = Connection(server.url)
        connection.ask("POST", "/history", b'{"clear": true}', JSON)
        connection.close()
        panel.open()
        panel.expect_file()
        panel.button("Verify …").click()
        expect(panel.problem).to_contain_text(f"Nobody has sampled {CHECKPOINT} since ComfyUI")
        mine = numbered(text_to_latent(stock_loader(), steps=9))
        panel.page.evaluate("async (prompt) => app.loadApiJson(prompt, 'mine')", mine)
        expect(look_at(panel, "Verify")).to_contain_text("64\u00d764, 9 steps")
        expect(panel.root).to_contain_text("Time: about that of 144 steps")
