"""What steers a model from outside: ControlNets, and patches of its attention (IP-Adapter)."""

from __future__ import annotations

import comfy.controlnet
import torch
from comfy.model_patcher import ModelPatcher
from harness.control import control_lora, controlnet, difference_controlnet, steered
from harness.inprocess import (
    assert_same_effect,
    conditioning,
    distance,
    load,
    parts,
    patched,
    sample,
    weight,
)
from harness.patches import patch_file
from hswq.loader.engine.adopt import ATTACHMENT
from toy.shapes import CONTEXT


def controlled(control) -> list:
    return steered(conditioning(1), control)


def assert_same_steering(models, theirs, ours) -> None:
    """Check that two ControlNets, each on its own model, change the result alike."""
    changes = [
        sample(patcher, controlled(control)) - sample(patcher)
        for patcher, control in zip(models, (theirs, ours), strict=True)
    ]
    assert changes[0].norm() > 0.05 * sample(models[0]).norm()
    assert distance(changes[1], changes[0]) < 0.5


class TestControlNet:
    def test_steers_as_on_16_bit(self, models):
        control = comfy.controlnet.load_controlnet_state_dict(controlnet())
        assert_same_steering(models, control, control)

    def test_of_differences_takes_the_weights_in_real_units(self, models):
        theirs, ours = (
            comfy.controlnet.load_controlnet_state_dict(difference_controlnet(), patcher)
            for patcher in models
        )
        assert_same_steering(models, theirs, ours)


class TestControlLora:
    def test_steers_as_on_16_bit(self, models):
        control = comfy.controlnet.load_controlnet_state_dict(control_lora())
        assert_same_steering(models, control, control)

    def test_takes_the_weights_in_real_units(self, models, legacy):
        control = comfy.controlnet.load_controlnet_state_dict(control_lora())
        control.pre_run(load(models.quantized).model, lambda percent: percent)
        layers = models.quantized.get_attachment(ATTACHMENT).layers
        copied = {
            name: control.control_model.get_submodule(name).weight
            for name in layers
            if f"{name}.up" in control.control_weights
        }
        assert len(copied) > 100
        for name, value in copied.items():
            real = value.dequantize() if len(parts(value)) > 1 else value
            assert distance(real.cpu(), weight(models.quantized, name)) < 1e-3, name
        control.cleanup()

    def test_with_a_lora_on_the_model(self, models):
        file = patch_file("LoRA")
        control = comfy.controlnet.load_controlnet_state_dict(control_lora())
        with_lora = [patched(patcher, file) for patcher in models]
        assert_same_steering(with_lora, control, control)


class TestAttentionPatches:
    """What IP-Adapter and its like use."""

    def test_added_context(self, models):
        tokens = torch.randn(1, 4, CONTEXT, generator=torch.Generator().manual_seed(4))

        def attend(q, k, v, extra_options):
            more = tokens.to(k).mean() + torch.zeros_like(k[:, :4])
            return q, torch.cat((k, more), 1), torch.cat((v, more + 20), 1)

        assert_same_effect(models, lambda patcher: _with(patcher, "set_model_attn2_patch", attend))

    def test_replaced_attention(self, models):
        def attend(q, k, v, extra_options):
            return 0.5 * q

        def change(patcher: ModelPatcher) -> ModelPatcher:
            changed = patcher.clone()
            for block in ("input", "middle", "output"):
                for number in range(9):
                    changed.set_model_attn2_replace(attend, block, number)
            return changed

        assert_same_effect(models, change)

    def test_own_layers_beside_the_models(self, models):
        """IP-Adapter projects its tokens with layers of its own, in the activations' dtype."""
        generator = torch.Generator().manual_seed(4)
        tokens = torch.randn(1, 4, 16, generator=generator)
        projections = {}

        def attend(out, extra_options):
            channels = out.shape[-1]
            if channels not in projections:
                projections[channels] = torch.randn(16, channels, generator=generator)
            own = tokens.to(out) @ projections[channels].to(out)
            return out + own.mean(1, keepdim=True)

        assert_same_effect(
            models, lambda patcher: _with(patcher, "set_model_attn2_output_patch", attend)
        )


def _with(patcher: ModelPatcher, method: str, function) -> ModelPatcher:
    changed = patcher.clone()
    getattr(changed, method)(function)
    return changed
