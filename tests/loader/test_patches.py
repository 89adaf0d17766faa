"""LoRAs and their like: the effect on the quantized model is that on the 16-bit one."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import (
    assert_same_effect,
    distance,
    effect,
    held,
    load,
    patched,
    same,
    sample,
    unload,
    weight,
)
from harness.patches import KINDS, patch_file
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint

LINEAR, CONV = 2, 4  # axes of their weights


def layers_of(patcher: ModelPatcher, axes: int, *, quantized: bool) -> list[str]:
    plan = patcher.get_attachment(ATTACHMENT)
    network = patcher.model.diffusion_model
    names = plan.quantized if quantized else plan.kept
    return [name for name in names if network.get_submodule(name).weight.ndim == axes]


class TestEffect:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_that_on_the_16_bit_model(self, models, kind):
        file = patch_file(kind)
        assert_same_effect(models, lambda patcher: patched(patcher, file))

    @pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "kept"])
    @pytest.mark.parametrize("axes", [LINEAR, CONV], ids=["Linear", "Conv2d"])
    def test_is_there_on_every_kind_of_layer(self, models, axes, quantized):
        layers = layers_of(models.quantized, axes, quantized=quantized)
        assert len(layers) > 10
        file = patch_file("LoRA", layers)
        # A few attention layers alone: what softmax makes of them is sensitive to quantization.
        assert_same_effect(models, lambda patcher: patched(patcher, file), at_most=0.7)

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bias"])
    def test_is_in_every_weight(self, models, legacy, kind):
        layers = models.quantized.get_attachment(ATTACHMENT).layers
        changes = []
        for patcher in models:
            before = {name: weight(patcher, name) for name in layers}
            after = load(patched(patcher, patch_file(kind, every=1)))
            changes.append({name: weight(after, name) - before[name] for name in layers})
        theirs, ours = changes
        assert not [name for name in layers if distance(ours[name], theirs[name]) > 0.5]

    def test_adds_up_of_several(self, models):
        files = [patch_file("LoRA", seed=seed) for seed in range(3)]

        def three(patcher: ModelPatcher) -> ModelPatcher:
            for file in files:
                patcher = patched(patcher, file, 0.6)
            return patcher

        assert_same_effect(models, three)
        one = effect(models.quantized, patched(models.quantized, files[0], 0.6))
        assert distance(one, effect(models.quantized, three(models.quantized))) > 0.5

    def test_follows_its_strength(self, models):
        file = patch_file("LoRA")
        ours = models.quantized
        for strength in (0.5, -1.0):
            assert_same_effect(models, lambda patcher, s=strength: patched(patcher, file, s))
        assert sample(patched(ours, file, 0.5)).equal(sample(patched(ours, file, 0.5)))


class TestHolding:
    def test_patched_weights_stay_fp8(self, models, legacy):
        before = held(models.quantized)
        after = held(load(patched(models.quantized, patch_file("LoRA"))))
        for name, (data, *_) in before.items():
            assert after[name][0].dtype == data.dtype, name

    @pytest.mark.parametrize("strength", [0.01, 1.0, 10.0])
    def test_scale_stays_in_step_with_the_one_that_was_searched(self, models, legacy, strength):
        """The same grid, so many octaves up or down that no more is clipped than before."""
        before = held(models.quantized)
        after = held(load(patched(models.quantized, patch_file("LoRA"), strength)))
        scales = [name for name, (_, *scale) in before.items() if scale]
        octaves = [torch.log2(after[name][1] / before[name][1]) for name in scales]
        assert all(octave == octave.round() for octave in octaves)
        assert (max(octaves) > 0) == (strength == 10)

    @pytest.mark.parametrize("scaled", [True, False], ids=["V2", "V1"])
    def test_without_a_patch_the_bytes_stay(self, memory, checkpoint, planner, scaled):
        """Dynamic VRAM puts small layers onto the GPU as if they were patched."""
        patcher = load_checkpoint(str(checkpoint), planner(scaled=scaled), only_model=True)[0]
        before = held(patcher)
        for layer in patcher.get_attachment(ATTACHMENT).quantized:
            key = f"diffusion_model.{layer}.weight"
            patcher.patch_weight_to_device(key, patcher.load_device, force_cast=True)
        assert not same(held(patcher), before)


class TestRemoval:
    @pytest.mark.parametrize("kind", ["LoRA", "DoRA", "difference", "bias"])
    def test_gives_the_bytes_back(self, models, kind):
        before, latent = held(models.quantized), sample(models.quantized)
        with_patch = sample(patched(models.quantized, patch_file(kind)))
        assert not with_patch.equal(latent)
        assert sample(models.quantized).equal(latent)
        unload()
        assert not same(held(models.quantized), before)

    def test_exchanging_patches_leaves_nothing_of_the_first(self, models):
        first, second = (patched(models.quantized, patch_file("LoRA", seed=s)) for s in (0, 1))
        alone = sample(second)
        unload()
        sample(first)
        assert sample(second).equal(alone)

    @pytest.mark.parametrize("patch_inside", [True, False])
    @pytest.mark.parametrize("remove_inside", [True, False])
    def test_is_independent_of_inference_mode(self, models, patch_inside, remove_inside):
        """Nodes run in it; what unloads a model may not (POST /free, routes, threads)."""
        before = held(models.quantized)
        with_patch = patched(models.quantized, patch_file("LoRA"))
        with torch.inference_mode(patch_inside), torch.no_grad():
            latent = sample(with_patch)
        with torch.inference_mode(remove_inside), torch.no_grad():
            comfy.model_management.unload_all_models()
        assert not same(held(models.quantized), before)
        with torch.inference_mode(not patch_inside), torch.no_grad():
            assert sample(with_patch).equal(latent)
