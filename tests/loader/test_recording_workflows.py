"""What workflows do beside one plain sampling: all of it is measured, each model's in its file."""

from __future__ import annotations

from pathlib import Path

import comfy.controlnet
import comfy.samplers
import nodes
import pytest
import torch
from harness.control import controlnet
from harness.inprocess import LATENT, conditioning, load_16_bit, sample
from harness.recording import assert_measured, hooks, measured, recorded
from toy.checkpoint import make_checkpoint

NAMES = ["input_blocks.0.0", "time_embed.0", "middle_block.1.transformer_blocks.0.attn2.to_k"]
"""A Conv2d, a Linear of vectors, and one of tokens."""


@pytest.fixture(autouse=True)
def every_layer(recorder, choose):
    """In every forward."""
    choose(Budget=100)


def latent(size: int = LATENT[2], batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 4, size, size)}


def ksampler(patcher, image: dict, positive=None, *, steps: int = 2, denoise: float = 1.0) -> dict:
    prompts = positive or conditioning(1), conditioning(2)
    return nodes.KSampler().sample(
        patcher, 0, steps, 5.0, "euler", "normal", *prompts, image, denoise
    )[0]


def stage(patcher, image: dict, start: int, end: int) -> dict:
    """Steps `start` to `end` of four, as a base and a refiner share them."""
    prompts = conditioning(1), conditioning(2)
    first, last = ("disable", "enable")[start == 0], ("disable", "enable")[end < 4]
    return nodes.KSamplerAdvanced().sample(
        patcher, first, 0, 4, 5.0, "euler", "normal", *prompts, image, start, end, last
    )[0]


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Another model's file, and the model."""
    path = make_checkpoint(tmp_path_factory.mktemp("second") / "refiner.safetensors", seed=1)
    return path, load_16_bit(path)


class TestOneModel:
    def test_image_to_image(self, model, checkpoint):
        """Half the steps, from a picture: what ran is what counts."""
        with measured(model, NAMES) as calls:
            ksampler(model, latent(), steps=3, denoise=0.5)
        found = recorded(checkpoint)
        assert_measured(found, calls)
        assert (found.samples, found.meta["total_steps"]) == (1, 3)

    def test_a_part_of_the_steps(self, model, checkpoint):
        with measured(model, NAMES) as calls:
            stage(model, latent(), 1, 3)
        found = recorded(checkpoint)
        assert_measured(found, calls)
        assert (found.samples, found.meta["total_steps"]) == (1, 2)

    def test_inpainting(self, model, checkpoint):
        masked = {**latent(), "noise_mask": torch.ones(1, 1, 16, 16)}
        with measured(model, NAMES) as calls:
            ksampler(model, masked, denoise=0.6)
        assert_measured(recorded(checkpoint), calls)

    def test_a_second_pass_of_twice_the_size(self, model, checkpoint):
        with measured(model, NAMES) as calls:
            small = ksampler(model, latent())
            (large,) = nodes.LatentUpscaleBy().upscale(small, "nearest-exact", 2.0)
            ksampler(model, large, denoise=0.5)
        found = recorded(checkpoint)
        assert_measured(found, calls)
        assert (found.samples, found.meta["total_steps"]) == (2, 4)

    def test_batches(self, model, checkpoint):
        with measured(model, NAMES) as calls:
            ksampler(model, latent(batch=2))
            ksampler(model, latent(batch=3), steps=1)
        found = recorded(checkpoint)
        assert_measured(found, calls)
        assert found.samples == 5

    def test_prompts_for_areas(self, model, checkpoint):
        """ComfyUI calls the model several times in a step, with parts of the picture."""
        (area,) = nodes.ConditioningSetArea().append(conditioning(3), 64, 128, 0, 0, 1.0)
        with measured(model, NAMES) as calls:
            ksampler(model, latent(), [*conditioning(1), *area])
        assert len(calls[NAMES[0]]) > 2
        assert_measured(recorded(checkpoint), calls)

    def test_a_controlnet(self, model, checkpoint):
        """Its own layers, which are copies with the same names, are none of the model's."""
        control = comfy.controlnet.load_controlnet_state_dict(controlnet())
        picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3))
        positive, _ = nodes.ControlNetApplyAdvanced().apply_controlnet(
            conditioning(1), [], control, picture, 1.0, 0.0, 1.0
        )
        names = [*NAMES, "output_blocks.0.0.in_layers.2"]  # which gets what the ControlNet adds
        with measured(model, names) as calls:
            ksampler(model, latent(), positive)
        assert_measured(recorded(checkpoint), calls)
        plain = {name: calls[name][-1].importance_sum for name in names}
        with measured(model, names) as calls:
            ksampler(model, latent())
        assert not torch.allclose(calls[names[-1]][-1].importance_sum, plain[names[-1]], rtol=1e-3)
        assert not [one for one in control.control_model.modules() if one._forward_hooks]


class TestTwoModels:
    def test_a_refiner(self, model, checkpoint, second, folder):
        path, refiner = second
        with measured(model, NAMES) as base_calls, measured(refiner, NAMES) as refiner_calls:
            stage(refiner, stage(model, latent(), 0, 3), 3, 4)
        for file, calls, steps in ((checkpoint, base_calls, 3), (path, refiner_calls, 1)):
            found = recorded(file)
            assert_measured(found, calls)
            assert (found.samples, found.meta["total_steps"]) == (1, steps)
            assert found.meta["model"] == Path(file).name
        assert len(list(folder.glob("*.pt"))) == 2

    def test_in_turn(self, model, checkpoint, second):
        path, other = second
        with measured(model, NAMES) as one_calls, measured(other, NAMES) as other_calls:
            for patcher in (model, other, model):
                sample(patcher)
        assert_measured(recorded(checkpoint), one_calls)
        assert_measured(recorded(path), other_calls)
        assert [recorded(file).samples for file in (checkpoint, path)] == [2, 1]
        assert hooks(model) == hooks(other) == 0

    def test_one_inside_the_others_sampling(self, model, checkpoint, second):
        """As detailers and some samplers do from their callbacks."""
        path, other = second
        with measured(model, NAMES) as one_calls, measured(other, NAMES) as other_calls:
            sample(model, steps=2, callback=lambda *_: sample(other))
        assert_measured(recorded(checkpoint), one_calls)
        assert_measured(recorded(path), other_calls)
        assert [recorded(file).samples for file in (checkpoint, path)] == [1, 2]
