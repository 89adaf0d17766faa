"""Converting a MODEL in memory: a quantized copy, the input and its clones as they were."""

from __future__ import annotations

import gc
import weakref

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras import nodes_hooks, nodes_model_advanced
from harness.inprocess import (
    alike,
    assert_same_effect,
    conditioning,
    distance,
    held,
    load,
    load_16_bit,
    load_partly,
    parts,
    patched,
    same,
    sample,
    unload,
    weight,
)
from harness.patches import patch_file
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.converter import convert
from hswq.loader.engine.patchers import is_quantized
from hswq.quant import Plan, quantize


@pytest.fixture
def plan(models) -> Plan:
    return models.quantized.get_attachment(ATTACHMENT)


def state(patcher: ModelPatcher) -> dict:
    """Return what a MODEL is, beside its weights."""
    return {
        "patches": {key: list(patches) for key, patches in patcher.patches.items()},
        "object patches": dict(patcher.object_patches),
        "options": str(patcher.model_options),
        "attachments": dict(patcher.attachments),
        "loaded": patcher.loaded_size(),
        "device": patcher.current_loaded_device(),
        "uuid": patcher.patches_uuid,
        "hook mode": patcher.hook_mode,
        "reload": patcher.cached_patcher_init,
        "class": type(patcher.model),
        "config": dict(patcher.model.model_config.__dict__),
    }


LOADED = {
    "not loaded": lambda patcher: patcher,
    "loaded": load,
    "half loaded": load_partly,
}


class TestConverted:
    def test_has_the_weights_that_the_loader_makes(self, models, plan):
        converted = convert(models.sixteen_bit, plan)
        assert not same(held(converted), held(models.quantized))
        assert alike(sample(converted), sample(models.quantized))
        assert converted.get_attachment(ATTACHMENT) is plan
        assert is_quantized(converted)

    @pytest.mark.parametrize("scaled", [True, False])
    def test_makes_its_own_plan(self, models, planner, scaled):
        converted = convert(models.sixteen_bit, planner(0.4, scaled=scaled))
        plan, weights = converted.get_attachment(ATTACHMENT), held(converted)
        assert plan.number_format.scaled == scaled
        assert len(plan.kept) == int(0.4 * len(plan.layers))
        for name, layer in plan.layers.items():
            value = weight(models.sixteen_bit, name)
            data, *scale = weights[f"{name}.weight"]
            if layer.quantized:
                expected = quantize(value.to(torch.float16), layer.amax, scaled=scaled)
                assert data.view(torch.uint8).equal(expected[0].view(torch.uint8).cpu())
                assert scale[0].equal(expected[1].cpu())
            else:
                assert data.float().equal(value.cpu())

    def test_has_the_loras_before_it_in_its_weights(self, models, plan):
        with_lora = patched(models.sixteen_bit, patch_file("LoRA"))
        converted = convert(with_lora, plan)
        assert not converted.patches
        latent = sample(with_lora)
        assert distance(latent, sample(models.sixteen_bit)) > 1
        assert distance(sample(converted), latent) < 0.5
        expected = load(with_lora.clone(disable_dynamic=True))  # which patches before the forward
        for name in plan.kept[:3]:
            assert distance(weight(converted, name), weight(expected, name)) < 1e-3

    def test_reacts_to_loras_after_it(self, models, plan):
        before = patch_file("LoRA", seed=1)
        theirs = patched(models.sixteen_bit, before)
        ours = convert(theirs, plan)
        assert_same_effect((theirs, ours), lambda each: patched(each, patch_file("LoRA")))

    def test_has_all_else_that_the_input_has(self, models, plan):
        """Its sampling, attention patches, and patches of what is not the diffusion model."""
        node = nodes_model_advanced.ModelSamplingDiscrete()
        model = node.patch(models.sixteen_bit, "v_prediction", False)[0]
        model.set_model_attn2_output_patch(lambda out, extra_options: 0.5 * out)
        ours = node.patch(models.quantized, "v_prediction", False)[0]
        ours.set_model_attn2_output_patch(lambda out, extra_options: 0.5 * out)
        converted = convert(model, plan)
        assert alike(sample(converted), sample(ours))
        assert not sample(converted).equal(sample(models.quantized))
        assert converted.model.model_type == model.model.model_type

    def test_cannot_be_converted_again(self, models, plan):
        with pytest.raises(ValueError, match="quantized already"):
            convert(models.quantized, plan)
        with pytest.raises(ValueError, match="quantized already"):
            convert(patched(models.quantized, patch_file("LoRA")), plan)

    def test_has_fewer_bytes_and_knows_it(self, models, plan):
        converted = convert(models.sixteen_bit, plan)
        assert converted.model_size() == models.quantized.model_size()

    @pytest.mark.gpu
    @pytest.mark.parametrize("lora", [False, True])
    def test_leaves_nothing_on_the_gpu(self, models, legacy, plan, lora):
        """The 16-bit model is there, but ComfyUI counts the new one as on the host."""
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        theirs = patched(models.sixteen_bit, patch_file("LoRA")) if lora else models.sixteen_bit
        converted = convert(load(theirs), plan)
        layers = (converted.model.diffusion_model.get_submodule(name) for name in plan.layers)
        tensors = (one for layer in layers for one in (layer.weight, layer.bias) if one is not None)
        devices = {part.device for one in tensors for part in parts(one)}
        assert devices == {converted.offload_device}

    def test_clones_without_dynamic_vram_have_the_same_weights(self, models, plan):
        converted = convert(patched(models.sixteen_bit, patch_file("LoRA")), plan)
        clone = converted.clone(disable_dynamic=True)
        assert not same(held(clone), held(converted))
        assert distance(sample(clone), sample(converted)) < 0.05


class TestInput:
    @pytest.mark.parametrize("where", LOADED)
    @pytest.mark.parametrize("lora", [False, True], ids=["plain", "with a LoRA"])
    def test_is_left_as_it_was(self, models, legacy, plan, where, lora):
        model = patched(models.sixteen_bit, patch_file("LoRA")) if lora else models.sixteen_bit
        LOADED[where](model)
        before, weights = state(model), held(model)
        converted = convert(model, plan)
        assert state(model) == before
        assert not same(held(model), weights)
        sample(patched(converted, patch_file("LoRA", seed=1)))
        assert not same(held(model), weights)

    def test_may_have_been_unloaded(self, legacy, checkpoint, models, plan):
        """By `/free`: then what ComfyUI made in inference mode was moved outside of it."""
        model = load_16_bit(checkpoint)
        for part in model.model.diffusion_model.modules():
            for name, value in part.named_parameters(recurse=False):
                setattr(part, name, torch.nn.Parameter(value.clone(), requires_grad=False))
        with torch.inference_mode(False):
            for value in model.model.parameters():
                value.data = torch.empty_like(value, device="cpu").copy_(value)
        assert not same(held(convert(model, plan)), held(models.quantized))

    @pytest.mark.parametrize("inside", [True, False])
    def test_and_its_clones_sample_as_before(self, models, plan, inside):
        with_lora = patched(models.sixteen_bit, patch_file("LoRA"))
        latents = [sample(patcher) for patcher in (models.sixteen_bit, with_lora)]
        with torch.inference_mode(inside), torch.no_grad():
            converted = convert(with_lora, plan)
        sample(converted)
        assert sample(with_lora).equal(latents[1])
        assert sample(models.sixteen_bit).equal(latents[0])

    def test_may_have_been_sampled_with_hooks(self, models, plan):
        """The copy must not share what ComfyUI needs to take hooks off the input."""
        hooks = nodes_hooks.comfy.hooks.create_hook_lora(patch_file("LoRA"), 1.0, 0.0)
        hooked = nodes_hooks.ConditioningSetProperties().set_properties(
            conditioning(1), 1.0, "default", hooks=hooks
        )[0]
        before = sample(models.sixteen_bit)
        converted, latents = convert(models.sixteen_bit, plan), []

        def look(*_):
            with torch.inference_mode():
                converted.unpatch_hooks()
                latents.append(same(held(converted), held(models.quantized)))

        sample(models.sixteen_bit, hooked, steps=2, callback=look)
        assert latents == [[], []]
        assert sample(models.sixteen_bit).equal(before)

    def test_goes_when_nobody_else_needs_it(self, legacy, checkpoint, plan):
        model = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_clip=False)[0]
        converted = convert(patched(model, patch_file("LoRA")), plan)
        gone = weakref.ref(model.model)
        del model
        unload()
        gc.collect()
        assert gone() is None
        assert any(len(parts(value)) > 1 for value in converted.model.parameters())
