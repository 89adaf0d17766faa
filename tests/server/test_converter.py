"""The converter makes a new model and leaves the one it is given as it is."""

import pytest
from harness.client import Client, Run
from harness.prompts import Prompt, converter, node, stock_loader, text_to_latent, through

pytestmark = pytest.mark.server


def looked_at(prompt: Prompt, name: str = "probe") -> Prompt:
    """Look at the model that the sampler gets, after it has sampled."""
    model = prompt["sampler"]["inputs"]["model"]
    return {**prompt, name: node("ProbeModel", model=model)}


def facts(run: Run) -> dict:
    return run.outputs["probe"]["facts"][0]


class TestInputModel:
    @pytest.mark.parametrize("mode", ["compatible", "scaled"])
    def test_is_not_changed(self, recorded: Client, mode: str):
        plain = text_to_latent(stock_loader())
        before = recorded.run(looked_at(plain))
        converted = through(plain, "converted", converter(["loader", 0], mode=mode))
        during = recorded.run(looked_at(converted))
        after = recorded.run(looked_at(plain))
        assert "loader" in during.cached
        assert "sampler" in after.executed
        assert "float8_e4m3fn" in facts(during)["layers"].values()
        assert facts(after) == facts(before)
        assert recorded.latent(after).equal(recorded.latent(before))
        assert not recorded.latent(during).equal(recorded.latent(before))

    def test_loras_before_it_become_part_of_the_weights(self, recorded: Client, lora: str):
        plain = text_to_latent(stock_loader(), steps=4)
        inputs = {"lora_name": lora, "strength_model": 1.0}
        patched = through(plain, "lora", node("LoraLoaderModelOnly", model=["loader", 0], **inputs))
        expected = recorded.latent(recorded.run(patched))
        converted = through(patched, "converted", converter(["lora", 0], mode="scaled"))
        found = recorded.latent(recorded.run(converted))
        original = recorded.latent(recorded.run(plain))
        effect = (expected - original).norm()
        assert effect > 0.1 * original.norm()
        assert (found - expected).norm() < effect / 2
