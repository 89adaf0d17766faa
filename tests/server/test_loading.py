"""The quantized model in a server's life: loaders, LoRAs, unloading, interrupts."""

import re
from collections.abc import Iterator

import pytest
import torch
from harness.client import Client, InterruptedPromptError
from harness.fixtures import free, wait_until_gone
from harness.lines import QUARTER_KEPT, layers_told
from harness.prompts import Prompt, hswq_loader, node, stock_loader, text_to_latent, through
from harness.server import ComfyUIServer, snapshot
from toy.checkpoint import make_diffusion_model

pytestmark = pytest.mark.server


def with_lora(prompt: Prompt, lora: str, strength: float = 1.0) -> Prompt:
    inputs = {"lora_name": lora, "strength_model": strength, "strength_clip": 0.0}
    loader = node("LoraLoader", model=["loader", 0], clip=["loader", 1], **inputs)
    return through(prompt, "lora", loader)


def spelled_otherwise(prompt: Prompt) -> Prompt:
    """Return a prompt that means the same, so that ComfyUI samples again instead of remembering."""
    positive = prompt["positive"]
    text = {**positive["inputs"], "text": positive["inputs"]["text"] + " "}
    return {**prompt, "positive": {**positive, "inputs": text}}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


class TestDiffusionModel:
    @pytest.fixture
    def alone(self, server: ComfyUIServer) -> Iterator[str]:
        """The checkpoint's diffusion model, as long as no other test looks for models."""
        path = make_diffusion_model(server.models / "diffusion_models" / "alone.safetensors")
        yield path.name
        path.unlink()

    def test_gives_what_its_checkpoint_gives(self, recorded: Client, alone: str):
        """With the input, too, that older workflows lack."""
        checkpoint = hswq_loader(fp8_matmul=True)
        inputs = {**checkpoint["inputs"], "unet_name": alone}
        del inputs["ckpt_name"]
        loader = node("HSWQDiffusionModelLoader", **inputs)
        expected = recorded.run(text_to_latent(checkpoint))
        run = recorded.run(through(text_to_latent(stock_loader()), "alone", loader))
        seconds = re.compile(r"loaded in [0-9.]+ s")  # the second time from what is kept
        told = [seconds.sub("", text) for text in (run.text("alone"), expected.text("loader"))]
        assert told[0] == told[1]
        assert layers_told(run.text("alone")) in QUARTER_KEPT
        assert re.search(r"no FP8 matrix products;|multiply in FP8;", run.text("alone"))
        assert recorded.latent(run).equal(recorded.latent(expected))


class TestLora:
    def test_has_the_effect_that_it_has_on_16_bit(self, recorded: Client, lora: str):
        latents = {}
        for loader in (stock_loader(), hswq_loader()):
            prompt = text_to_latent(loader, steps=4)
            without, patched = (
                recorded.latent(recorded.run(each)) for each in (prompt, with_lora(prompt, lora))
            )
            latents[loader["class_type"]] = without, patched
        (plain, plain_lora), (fp8, fp8_lora) = latents.values()
        effect = distance(plain_lora, plain)
        assert effect > 0.1
        assert distance(fp8, plain) < effect / 2
        assert distance(fp8_lora, plain_lora) < effect / 2

    @pytest.mark.parametrize("results", [True, False], ids=["and results", "models only"])
    def test_free_and_run_again_gives_the_same(self, recorded: Client, lora: str, results: bool):
        prompt = with_lora(text_to_latent(hswq_loader()), lora)
        before = recorded.latent(recorded.run(prompt))
        free(recorded, results=results)
        run = recorded.run(spelled_otherwise(prompt))
        assert ("loader" in run.executed) == results
        assert "sampler" in run.executed
        assert recorded.latent(run).equal(before)

    def test_taking_it_off_gives_the_model_back(self, recorded: Client, lora: str):
        prompt = text_to_latent(hswq_loader())
        before = recorded.latent(recorded.run(prompt))
        patched = recorded.latent(recorded.run(with_lora(prompt, lora)))
        after = recorded.run(spelled_otherwise(prompt))
        assert "loader" in after.cached
        assert not patched.equal(before)
        assert recorded.latent(after).equal(before)


class TestInterrupt:
    def test_an_interrupted_load_leaves_nothing(self, server: ComfyUIServer, recorded: Client):
        prompt = text_to_latent(hswq_loader())
        files = snapshot(server.models)

        def interrupt(event: dict) -> None:
            if event["type"] == "progress" and event["data"]["node"] == "loader":
                recorded.interrupt()

        with pytest.raises(InterruptedPromptError, match="loader"):
            recorded.run(prompt, interrupt)
        wait_until_gone(recorded)
        found = recorded.get_json("/probe/models")
        assert (found["loaded"], found["alive"]) == ([], 0)
        assert snapshot(server.models) == files
        searched = recorded.latent(recorded.run(prompt))
        free(recorded)
        by_the_kept_plan = recorded.latent(recorded.run(prompt))
        assert searched.equal(by_the_kept_plan)
