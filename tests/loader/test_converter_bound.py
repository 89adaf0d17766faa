"""Converting a MODEL that others have bound something to: it is carried over, or refused."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy_extras import nodes_model_advanced
from comfy_extras.nodes_torch_compile import TorchCompileModel
from harness.inprocess import alike, distance, held, load, same, sample
from harness.patches import patch_file
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.converter import convert
from hswq.quant import Plan

PART = "diffusion_model.time_embed"


@pytest.fixture
def plan(models) -> Plan:
    return models.quantized.get_attachment(ATTACHMENT)


def with_object_patch(model: ModelPatcher, key: str) -> ModelPatcher:
    """Return a clone with a part compiled, as extensions do; it is the same part otherwise."""
    clone = model.clone()
    compiled = torch.compile(model.get_model_object(key), backend="eager")
    clone.add_object_patch(key, compiled)
    return clone


def with_bypass_lora(model: ModelPatcher) -> ModelPatcher:
    """Return what the node "Load LoRA (Bypass)" does."""
    return comfy.sd.load_bypass_lora_for_models(model, None, patch_file("LoRA"), 1.0, 0.0)[0]


def with_wrapper(model: ModelPatcher, held_by_it: object) -> ModelPatcher:
    """Return a clone whose results are halved by a function that holds something."""

    def half(executor, *args, **kwargs):
        return executor(*args, **kwargs) * (0.5 if held_by_it else 1.0)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "half", half)
    return clone


def with_attention_patch(model: ModelPatcher, module: torch.nn.Module) -> ModelPatcher:
    """Return a clone with a patch as IP-Adapter's, which holds a module."""
    clone = model.clone()
    clone.set_model_attn2_output_patch(lambda out, _, held_by_it=module: 0.5 * out)
    return clone


def with_injection(model: ModelPatcher) -> ModelPatcher:
    clone = model.clone()
    nothing = PatcherInjection(inject=lambda _: None, eject=lambda _: None)
    clone.set_injections("motion", [nothing])
    return clone


def with_other_gpus(model: ModelPatcher) -> ModelPatcher:
    clone = model.clone()
    clone.set_additional_models("multigpu", [model.clone()])
    return clone


def a_part(model: ModelPatcher) -> torch.nn.Module:
    return model.get_model_object(PART)[0]


REFUSED = {
    "the wrapper 'torch.compile'": lambda m: TorchCompileModel.execute(m, "inductor").result[0],
    "the injection 'bypass_lora'": with_bypass_lora,
    "the injection 'motion'": with_injection,
    "the object patch 'diffusion_model'": lambda m: with_object_patch(m, "diffusion_model"),
    f"the object patch '{PART}'": lambda m: with_object_patch(m, PART),
    "the wrapper 'half'": lambda m: with_wrapper(m, a_part(m)),
    "the model option 'patches'": lambda m: with_attention_patch(m, a_part(m)),
    "its copies on other GPUs": with_other_gpus,
}


class TestRefused:
    @pytest.mark.parametrize("what", REFUSED)
    def test_is_what_works_on_the_old_modules(self, models, plan, what):
        model, before = REFUSED[what](models.sixteen_bit), held(models.sixteen_bit)
        expected = f"^{what} works only on the 16-bit model.*after the HSWQ FP8 Converter$"
        with pytest.raises(ValueError, match=expected):
            convert(model, plan)
        assert not same(held(models.sixteen_bit), before)

    def test_is_it_also_where_it_is_loaded(self, models, legacy, plan):
        for make in (with_bypass_lora, lambda m: with_object_patch(m, "diffusion_model")):
            model = load(make(models.sixteen_bit))
            with pytest.raises(ValueError, match="works only on the 16-bit model"):
                convert(model, plan)


class TestCarriedOver:
    def test_is_what_holds_nothing_of_the_model(self, models, plan):
        for change in (
            lambda model: with_wrapper(model, torch.nn.Linear(2, 2)),
            lambda model: with_attention_patch(model, torch.nn.Linear(2, 2)),
        ):
            converted = convert(change(models.sixteen_bit), plan)
            assert alike(sample(converted), sample(change(models.quantized)))
            assert distance(sample(converted), sample(models.quantized)) > 0.05


OF_A_CLONE = {
    "compiled": lambda model: with_object_patch(model, "diffusion_model"),
    "a part compiled": lambda model: with_object_patch(model, PART),
    "bypass LoRA": with_bypass_lora,
    "sampling": lambda model: nodes_model_advanced.ModelSamplingDiscrete().patch(
        model, "v_prediction", False
    )[0],
}


class TestClones:
    """What is in the network while a clone of the input is loaded is not the input's."""

    @pytest.mark.parametrize("change", OF_A_CLONE)
    def test_leave_the_input_as_it_is(self, models, legacy, plan, change):
        clone = OF_A_CLONE[change](models.sixteen_bit)
        latent = sample(clone)
        load(clone)
        converted = convert(models.sixteen_bit, plan)
        assert not same(held(converted), held(models.quantized))
        assert alike(sample(clone), latent)
        assert alike(sample(converted), sample(models.quantized))
