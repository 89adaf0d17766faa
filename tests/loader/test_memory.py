"""The quantized model in ComfyUI's memory management: offloaded, unloaded, cloned."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import (
    alike,
    assert_same_effect,
    built_in_place,
    distance,
    effect,
    held,
    load,
    load_16_bit,
    load_partly,
    parts,
    patched,
    predicted,
    same,
    sample,
    streamed,
    unload,
)
from harness.patches import patch_file
from hswq.loader.engine import loading
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint


def waiting(patcher: ModelPatcher) -> int:
    """Return how many layers have patches that wait for the forward."""
    return sum(
        any(getattr(f, "is_lowvram_patch", False) for f in getattr(part, "weight_function", ()))
        for part in patcher.model.diffusion_model.modules()
    )


class TestThatFits:
    """Dynamic VRAM would keep it on the host as well and copy it in the first step."""

    @pytest.fixture
    def models(self, dynamic_vram, checkpoint, planner):
        """The toy in 16 bit, as ComfyUI loads it, and quantized with its CLIP and VAE."""
        return load_16_bit(checkpoint), *load_checkpoint(str(checkpoint), planner())

    def test_stays_on_the_gpu(self, models):
        _, quantized, clip, _ = models
        assert not quantized.is_dynamic()
        assert quantized.loaded_size() == quantized.model_size()
        assert all(tensor.is_cuda for tensor in quantized.model.diffusion_model.parameters())
        assert clip.patcher.is_dynamic()

    def test_samples_in_turn_with_models_under_dynamic_vram(self, models):
        sixteen_bit, quantized, *_ = models
        assert sixteen_bit.is_dynamic()
        latents = [[sample(patcher) for patcher in (sixteen_bit, quantized)] for _ in range(2)]
        assert all(map(alike, *latents))
        assert distance(latents[0][1], latents[0][0]) < 0.2

    def test_goes_where_it_does_not_fit(self, models):
        """A model that ComfyUI loads next pushes it out, as any other."""
        sixteen_bit, quantized, *_ = models
        latent = sample(quantized)
        comfy.model_management.free_memory(1e30, quantized.load_device)
        assert quantized.loaded_size() == 0
        sample(sixteen_bit)
        assert alike(sample(quantized), latent)

    @pytest.mark.parametrize("in_place", [False, True], ids=["", "built on the GPU"])
    def test_leaves_nothing_behind_by_its_clones(self, checkpoint, planner, monkeypatch, in_place):
        """ComfyUI takes a clone's new weights and drops the patcher that they came with."""
        monkeypatch.setattr(loading, "make_room", lambda *_: True)
        if in_place:
            built_in_place(monkeypatch)
        unload()
        loaded = comfy.model_management.current_loaded_models
        before = {id(one) for one in loaded}  # of what other tests have left
        quantized = load_checkpoint(str(checkpoint), planner(), only_model=True)[0]
        assert quantized.loaded_size() == quantized.model_size()
        clones = [
            quantized.clone(force_deepcopy=True),
            quantized.deepclone_multigpu(new_load_device=quantized.load_device),
        ]
        assert {one.model for one in loaded if id(one) not in before} <= {quantized}
        for clone in clones:
            assert alike(sample(clone), sample(quantized))

    def test_takes_loras_and_gives_them_back(self, models):
        sixteen_bit, quantized, *_ = models
        before = held(quantized)
        assert_same_effect(
            (sixteen_bit, quantized), lambda patcher: patched(patcher, patch_file("LoRA"))
        )
        unload()
        assert not same(held(quantized), before)


class TestThatDoesNotFit:
    """It goes without Dynamic VRAM too, where ComfyUI has that for CLIP and VAE."""

    @pytest.fixture
    def models(self, dynamic_vram, checkpoint, planner, monkeypatch):
        """The quantized toy as it is loaded where the GPU has no room for it, and its CLIP."""
        monkeypatch.setattr(loading, "make_room", lambda *_: False)
        return load_checkpoint(str(checkpoint), planner())[:2]

    def test_is_not_dynamic(self, models):
        quantized, clip = models
        assert not quantized.is_dynamic()
        assert clip.patcher.is_dynamic()
        assert quantized.loaded_size() == 0

    def test_streams_what_has_no_room(self, models):
        quantized, _ = models
        latent = sample(quantized)
        unload()
        load_partly(quantized, 0.3)
        assert 0 < quantized.loaded_size() < quantized.model_size()
        assert distance(predicted(quantized), predicted(load(quantized))) < 1e-3
        assert distance(sample(quantized), latent) < 1e-3


class TestPartlyLoaded:
    """Where the GPU has no room for all of it."""

    @pytest.mark.parametrize("share", [0.01, 0.3, 0.7])
    def test_gives_the_same_result(self, models, legacy, share):
        latent = sample(models.quantized)
        unload()
        load_partly(models.quantized, share)
        assert models.quantized.loaded_size() < models.quantized.model_size()
        assert distance(predicted(models.quantized), predicted(load(models.quantized))) < 1e-3
        assert distance(sample(models.quantized), latent) < 1e-3

    def test_applies_loras_in_the_forward(self, models, legacy):
        changes = []
        for patcher in models:
            plain = predicted(load(patcher))
            unload()
            with_lora = load_partly(patched(patcher, patch_file("LoRA")), 0.01)
            assert waiting(with_lora) > 80
            changes.append(predicted(with_lora) - plain)
            unload()
        assert changes[0].norm() > 0
        assert distance(changes[1], changes[0]) < 0.5

    def test_adds_a_lora_in_full_precision_there(self, models, legacy):
        """Not requantized, the result is nearer to the 16-bit model's."""
        with_lora = [patched(patcher, patch_file("LoRA")) for patcher in models]
        theirs = predicted(load(with_lora[0]))
        requantized = predicted(load(with_lora[1]))
        unload()
        offloaded = predicted(load_partly(with_lora[1], 0.01))
        assert distance(offloaded, theirs) < distance(requantized, theirs)

    def test_part_of_it_can_be_unloaded_and_loaded_again(self, models, legacy):
        patcher = patched(models.quantized, patch_file("LoRA"))
        before = held(models.quantized)
        latent = predicted(load(patcher))
        freed = patcher.partially_unload(patcher.offload_device, 0.5 * patcher.model_size())
        assert freed >= 0.5 * patcher.model_size()
        assert waiting(patcher) > 10
        assert distance(predicted(patcher), latent) < 0.5  # not requantized, so not the same
        patcher.partially_load(patcher.load_device, 1e32)
        assert waiting(patcher) == 0
        assert predicted(patcher).equal(latent)
        patcher.detach()
        assert not same(held(models.quantized), before)

    @pytest.mark.parametrize("more", [0.1, 30_000], ids=["nothing", "little"])
    def test_loading_more_adds_no_lora_a_second_time(self, models, legacy, more):
        """ComfyUI loads more before each sampling, if only a tenth of a byte."""
        both = patched(models.quantized, patch_file("LoRA", every=1) | patch_file("bias", every=1))
        patcher = load_partly(both, 0.6)
        latent, loaded = predicted(patcher), patcher.loaded_size()
        whole = loaded + streamed(patcher)
        assert waiting(patcher) > 5
        for _ in range(3):
            patcher.partially_load(patcher.load_device, more)
        assert distance(predicted(patcher), latent) < 0.01
        assert patcher.loaded_size() >= loaded
        assert patcher.loaded_size() + streamed(patcher) == whole


class TestUnloaded:
    def test_and_loaded_again_it_is_the_same(self, models):
        before, latent = held(models.quantized), sample(models.quantized)
        for inside in (True, False):
            with torch.inference_mode(inside), torch.no_grad():
                comfy.model_management.unload_all_models()
                assert not same(held(models.quantized), before)
                assert sample(models.quantized).equal(latent)

    def test_it_leaves_the_gpu(self, models):
        load(models.quantized)
        unload()
        devices = {
            part.device.type
            for parameter in models.quantized.model.diffusion_model.parameters()
            for part in parts(parameter)
        }
        assert devices == {models.quantized.offload_device.type}

    def test_scale_and_bytes_are_on_one_device(self, models, legacy):
        for move in (load, load_partly, lambda _: unload()):
            move(models.quantized)
            for parameter in models.quantized.model.diffusion_model.parameters():
                assert len({part.device for part in parts(parameter)}) == 1

    def test_moving_the_module_keeps_it_quantized(self, models, legacy):
        before = held(models.quantized)
        for inside in (True, False):
            with torch.inference_mode(inside), torch.no_grad():
                network = models.quantized.model.diffusion_model
                network.to(models.quantized.load_device)
                network.to(models.quantized.offload_device)
        assert not same(held(models.quantized), before)


class TestSeveral:
    def test_two_quantized_ones_and_one_in_16_bit(self, models, memory, checkpoint, planner):
        """Each with its own Plan and LoRA, sampled in turn."""
        other = load_checkpoint(str(checkpoint), planner(0.0, scaled=False), only_model=True)[0]
        three = {
            "16 bit": models.sixteen_bit,
            "V2": models.quantized,
            "V1": other,
            "LoRA": patched(models.quantized, patch_file("LoRA")),
        }
        alone = {}
        for name, patcher in three.items():
            alone[name] = sample(patcher)
            unload()
        comfy.model_management.load_models_gpu([models.sixteen_bit, models.quantized, other])
        for name in [*three, *reversed(three)]:
            assert alike(sample(three[name]), alone[name]), name
        assert len({latent.sum().item() for latent in alone.values()}) == len(three)

    def test_plans_stay_their_own(self, models, checkpoint, planner):
        other = load_checkpoint(str(checkpoint), planner(0.5), only_model=True)[0]
        plans = [patcher.get_attachment(ATTACHMENT) for patcher in (models.quantized, other)]
        assert len(plans[0].kept) < len(plans[1].kept)
        assert models.quantized.model_size() < other.model_size()


class TestClones:
    def test_share_the_weights(self, models):
        clone = models.quantized.clone()
        assert clone.model is models.quantized.model
        assert clone.get_attachment(ATTACHMENT) is models.quantized.get_attachment(ATTACHMENT)
        assert sample(clone).equal(sample(models.quantized))

    @pytest.mark.parametrize("how", [{"disable_dynamic": True}, {"force_deepcopy": True}])
    def test_with_weights_of_their_own_have_the_same(self, models, memory, how):
        original = patched(models.quantized, patch_file("LoRA"))
        clone = original.clone(**how)
        assert (clone.model is original.model) == ("disable_dynamic" in how)
        assert not clone.is_dynamic()
        assert not same(held(clone), held(models.quantized))
        assert clone.patches.keys() == original.patches.keys()
        assert distance(sample(clone), sample(original)) < 0.05

    def test_for_several_gpus_have_the_same(self, models):
        original = patched(models.quantized, patch_file("LoRA"))
        latent = sample(original)
        clone = original.deepclone_multigpu(new_load_device=original.load_device)
        assert clone.model is not original.model
        assert not same(held(clone), held(models.quantized))
        assert clone.get_attachment(ATTACHMENT) is original.get_attachment(ATTACHMENT)
        assert distance(sample(clone), latent) < 1e-3

    def test_are_independent_of_the_original(self, models):
        clone = models.quantized.clone(force_deepcopy=True)
        before = held(models.quantized)
        load(patched(clone, patch_file("LoRA")))
        assert not same(held(models.quantized), before)
        assert_same_effect(
            (models.sixteen_bit, clone), lambda patcher: patched(patcher, patch_file("LoRA"))
        )

    def test_come_from_a_factory_that_loads_the_same(self, models):
        for disable_dynamic in (False, True):
            factory, arguments, *_ = models.quantized.cached_patcher_init
            again = factory(*arguments, disable_dynamic=disable_dynamic)
            assert not same(held(again), held(models.quantized))
            assert again.cached_patcher_init[0] is factory
            assert effect(models.quantized, again).norm() < 1e-3
