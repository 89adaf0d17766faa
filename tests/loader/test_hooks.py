"""Conditioning hooks: LoRAs that ComfyUI puts on and takes off while it samples."""

from __future__ import annotations

import comfy.hooks
import pytest
import torch
from comfy.hooks import EnumHookMode, HookGroup
from comfy.model_management import cast_to, get_offload_stream
from comfy_extras import nodes_hooks
from harness.inprocess import (
    conditioning,
    distance,
    held,
    load,
    load_partly,
    patched,
    same,
    sample,
    unload,
)
from harness.patches import patch_file
from hswq.loader.engine.adopt import ATTACHMENT

MODES = [EnumHookMode.MinVram, EnumHookMode.MaxSpeed]


def lora_hook(seed: int = 0, strength: float = 1.0, kind: str = "LoRA") -> HookGroup:
    return comfy.hooks.create_hook_lora(patch_file(kind, seed=seed), strength, 0.0)


def hooked(hooks: HookGroup, seed: int = 1) -> list:
    """Return a prompt with hooks on it."""
    node = nodes_hooks.ConditioningSetProperties()
    return node.set_properties(conditioning(seed), 1.0, "default", hooks=hooks)[0]


def keyframes(*strengths: float) -> comfy.hooks.HookKeyframeGroup:
    """Return keyframes that share the sampling's time equally."""
    group = None
    for number, strength in enumerate(strengths):
        node = nodes_hooks.CreateHookKeyframe()
        group = node.create_hook_keyframe(strength, number / len(strengths), group)[0]
    return group


def effects(models, positive: list, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a prompt changes on both models against the plain one."""
    return tuple(sample(patcher, positive, **how) - sample(patcher, **how) for patcher in models)


class TestOneGroup:
    def test_is_the_same_as_the_lora_on_the_model(self, models):
        with_hook = sample(models.quantized, hooked(lora_hook()))
        with_lora = sample(patched(models.quantized, patch_file("LoRA")))
        # On a GPU hooks go onto the FP8 weights, where they swap in every step.
        assert distance(with_hook, with_lora) < (0.3 if torch.cuda.is_available() else 0.05)

    @pytest.mark.parametrize("kind", ["LoRA", "difference", "bias"])
    def test_has_the_effect_that_it_has_on_16_bit(self, models, kind):
        theirs, ours = effects(models, hooked(lora_hook(kind=kind)))
        assert distance(ours, theirs) < 0.5

    def test_of_a_whole_model_has_the_effect_that_it_has_on_16_bit(self, models):
        """The difference to another checkpoint: the node "Create Hook Model as LoRA"."""
        other = held(models.sixteen_bit)
        changed = held(load(patched(models.sixteen_bit, patch_file("difference"))))
        unload()
        weights = {f"diffusion_model.{name}": changed[name][0] for name in other}
        hooks = comfy.hooks.create_hook_model_as_lora(weights, None, 1.0, 0.0)
        theirs, ours = effects(models, hooked(hooks))
        assert theirs.norm() > 0.1 * sample(models.sixteen_bit).norm()
        assert distance(ours, theirs) < 0.5

    def test_follows_its_keyframes(self, models):
        node = nodes_hooks.SetHookKeyframes()
        for strengths in ((1.0, 0.0), (0.5, -0.5)):
            hooks = node.set_hook_keyframes(lora_hook(), keyframes(*strengths))[0]
            theirs, ours = effects(models, hooked(hooks), steps=2)
            assert distance(ours, theirs) < 0.5, strengths

    def test_adds_to_a_lora_on_the_model(self, models):
        file = patch_file("LoRA", seed=1)
        theirs, ours = (
            sample(patched(patcher, file), hooked(lora_hook())) - sample(patched(patcher, file))
            for patcher in models
        )
        assert distance(ours, theirs) < 0.5


class TestSeveralGroups:
    """One prompt with one LoRA, another with another: ComfyUI exchanges them in every step."""

    @pytest.mark.parametrize("mode", MODES, ids=["MinVram", "MaxSpeed"])
    def test_each_is_on_its_own_prompt(self, models, mode):
        for patcher in models:
            patcher.set_hook_mode(mode)
        both = hooked(lora_hook(0)) + hooked(lora_hook(1), seed=3)
        plain = conditioning(1) + conditioning(3)
        theirs, ours = (
            sample(patcher, both, steps=3) - sample(patcher, plain, steps=3) for patcher in models
        )
        assert distance(ours, theirs) < 0.5

    @pytest.mark.parametrize("mode", MODES, ids=["MinVram", "MaxSpeed"])
    def test_one_prompt_without(self, models, mode):
        models.quantized.set_hook_mode(mode)
        plain = sample(models.quantized, cfg=4.0, steps=3)
        hook = hooked(lora_hook())
        theirs, ours = (sample(patcher, hook, cfg=4.0, steps=3) for patcher in models)
        assert distance(ours, theirs) < distance(ours, plain)

    def test_modes_differ_by_rounding_only(self, models):
        both = hooked(lora_hook(0)) + hooked(lora_hook(1), seed=3)
        latents = []
        for mode in MODES:
            models.quantized.set_hook_mode(mode)
            latents.append(sample(models.quantized, both, steps=3))
        assert distance(*latents) < 0.1


class TestRemoval:
    @pytest.mark.parametrize("mode", MODES, ids=["MinVram", "MaxSpeed"])
    @pytest.mark.parametrize("groups", [1, 2])
    def test_gives_the_bytes_back(self, models, mode, groups):
        models.quantized.set_hook_mode(mode)
        before, latent = held(models.quantized), sample(models.quantized)
        positive = [
            part for seed in range(groups) for part in hooked(lora_hook(seed), seed=seed + 1)
        ]
        assert not sample(models.quantized, positive, steps=3).equal(latent)
        assert not same(held(models.quantized), before)
        assert sample(models.quantized).equal(latent)

    def test_after_an_error(self, models):
        before = held(models.quantized)

        def fail(*_):
            raise RuntimeError("in the middle")

        with pytest.raises(RuntimeError, match="in the middle"):
            sample(models.quantized, hooked(lora_hook()), steps=2, callback=fail)
        assert not same(held(models.quantized), before)

    def test_of_the_lora_below_it_too(self, models):
        before = held(models.quantized)
        with_lora = patched(models.quantized, patch_file("LoRA", seed=1))
        first = sample(with_lora, hooked(lora_hook()))
        assert sample(with_lora, hooked(lora_hook())).equal(first)
        unload()
        assert not same(held(models.quantized), before)


@pytest.mark.gpu
def test_what_is_still_streamed_is_not_overwritten(models, legacy):
    """Else a step would compute with the weights of the next prompt's hooks."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    unload()  # it may be there as a whole
    patcher = load_partly(models.quantized, 0.3)
    network, device = patcher.model.diffusion_model, patcher.load_device
    quantized = patcher.get_attachment(ATTACHMENT).quantized
    weights = {f"{name}.weight": network.get_submodule(name).weight for name in quantized}
    name, weight = next(one for one in weights.items() if one[1].is_pinned())
    before, other, key = weight.clone(), weight.clone(), f"diffusion_model.{name}"
    other._qdata.zero_()
    try:
        for take_off in (lambda: patcher.patch_hooks(None), patcher.clean_hooks):
            patcher.hook_backup[key] = other, weight.device
            stream = get_offload_stream(device)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000_000)
            there = cast_to(weight, None, device, non_blocking=True, stream=stream)
            assert not stream.query()
            take_off()
            torch.cuda.synchronize()
            assert not weight._qdata.view(torch.uint8).any()
            assert there._qdata.cpu().view(torch.uint8).equal(before._qdata.view(torch.uint8))
            weight.copy_(before)
    finally:
        weight.copy_(before)
