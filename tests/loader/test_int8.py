"""INT8 with a scale a row in memory: what ComfyUI does with weights works as it does with FP8."""

from __future__ import annotations

import copy

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy_api.torch_helpers import set_torch_compile_wrapper
from harness.inprocess import (
    alike,
    assert_frees_what_is_asked,
    assert_same_effect,
    distance,
    effect,
    held,
    load,
    load_16_bit,
    load_partly,
    patched,
    same,
    sample,
    unload,
    weight,
)
from harness.patches import KINDS, patch_file
from hswq.calibration import DualMonitor
from hswq.loader.engine import quantizer
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.converter import convert
from hswq.loader.engine.layout import hold
from hswq.loader.engine.loading import load_checkpoint
from hswq.quant import (
    FP8_SCALED,
    INT8,
    NUMBER_FORMATS,
    BySensitivity,
    Planner,
    dequantize,
    int8,
)
from toy.checkpoint import make_trained_checkpoint

LINEAR, CONV = "middle_block.1.transformer_blocks.0.ff.net.2", "middle_block.0.in_layers.2"
_made: dict[str, ModelPatcher] = {}


def planner(statistics) -> Planner:
    return Planner(statistics, BySensitivity(0.1), INT8)


@pytest.fixture
def ours(memory, checkpoint, statistics, inference_mode):
    """The toy in INT8. What a test leaves in its weights is an error."""
    if memory not in _made:
        _made[memory] = load_checkpoint(str(checkpoint), planner(statistics), only_model=True)[0]
    before = held(_made[memory])
    yield _made[memory].clone()
    unload()
    assert not same(held(_made[memory]), before)


@pytest.fixture
def pair(ours, models) -> tuple[ModelPatcher, ModelPatcher]:
    """The toy in 16 bit and in INT8."""
    return models.sixteen_bit, ours


class TestLoading:
    def test_linear_and_conv_are_int8_with_a_scale_a_row(self, ours):
        plan = ours.get_attachment(ATTACHMENT)
        assert plan.number_format is INT8
        kinds = set()
        for name in plan.quantized:
            held_weight = ours.model.diffusion_model.get_submodule(name).weight
            assert isinstance(held_weight, QuantizedTensor)
            assert held_weight._qdata.dtype is torch.int8
            assert held_weight._params.scale.shape == (held_weight.shape[0], 1)
        kinds = {
            ours.model.diffusion_model.get_submodule(name).weight.ndim for name in plan.quantized
        }
        assert kinds == {2, 4}
        assert plan.number_format.title == "INT8"

    def test_again_with_its_plan_gives_the_same_bytes(self, ours, checkpoint):
        plan = ours.get_attachment(ATTACHMENT)
        again = load_checkpoint(str(checkpoint), plan, only_model=True)[0]
        assert not same(held(again), held(ours))

    def test_a_clone_with_weights_of_its_own_has_the_same(self, ours):
        load_again, arguments = ours.cached_patcher_init
        assert not same(held(load_again(*arguments, disable_dynamic=True)), held(ours))

    def test_converted_it_is_the_same(self, ours, models):
        converted = convert(models.sixteen_bit, ours.get_attachment(ATTACHMENT))
        assert not same(held(converted), held(ours))

    @pytest.mark.parametrize("share", [0.01, 0.5])
    def test_offloaded_it_samples_the_same(self, ours, legacy, share):
        expected = sample(ours)
        unload()
        assert alike(sample(load_partly(ours, share)), expected)

    def test_no_more_leaves_than_a_vae_asks_for(self, ours, legacy):
        assert_frees_what_is_asked(ours)

    def test_a_device_without_fp8_is_told_to_take_it(self, monkeypatch):
        monkeypatch.setattr(comfy.model_management, "supports_cast", lambda *_: False)
        assert quantizer.quantizing_device(INT8) == comfy.model_management.get_torch_device()
        with pytest.raises(ValueError, match="has no FP8: choose the mode int8"):
            quantizer.quantizing_device(FP8_SCALED)


class TestPatches:
    @pytest.mark.parametrize("kind", KINDS)
    def test_have_the_effect_that_they_have_on_16_bit(self, pair, kind):
        file = patch_file(kind)
        assert_same_effect(pair, lambda patcher: patched(patcher, file))

    def test_go_onto_the_original_where_the_file_is_there(self, pair, legacy):
        """The weight is that of quantizing the merged one: no error comes on top."""
        merged, found = (load(patched(one, patch_file("LoRA", [LINEAR]))) for one in pair)
        exact = weight(merged, LINEAR)
        scale = found.model.diffusion_model.get_submodule(LINEAR).weight._params.scale.cpu()
        expected = dequantize(int8.with_scale(exact, scale), scale, torch.float32)
        assert distance(weight(found, LINEAR), exact) < 1.02 * distance(expected, exact)

    def test_patched_weights_stay_int8_and_come_off_again(self, ours, legacy):
        before, latent = held(ours), sample(ours)
        after = held(load(patched(ours, patch_file("LoRA"))))
        assert all(after[name][0].dtype == data.dtype for name, (data, *_) in before.items())
        assert same(after, before)
        assert sample(ours).equal(latent)
        unload()
        assert not same(held(ours), before)

    def test_without_a_patch_the_bytes_stay(self, memory, checkpoint, statistics):
        """Dynamic VRAM puts small layers onto the GPU as if they were patched."""
        patcher = load_checkpoint(str(checkpoint), planner(statistics), only_model=True)[0]
        before = held(patcher)
        for layer in patcher.get_attachment(ATTACHMENT).quantized:
            key = f"diffusion_model.{layer}.weight"
            patcher.patch_weight_to_device(key, patcher.load_device, force_cast=True)
        assert not same(held(patcher), before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, ModelPatcher]:
    """The trained toy in 16 bit, and in INT8 and FP8 by what a sampling of it recorded."""
    path = make_trained_checkpoint(tmp_path_factory.mktemp("trained") / "toy.safetensors")
    found = {}
    with torch.inference_mode():
        found["16 bit"] = load_16_bit(path)
        with DualMonitor(found["16 bit"].model.diffusion_model) as monitor:
            sample(found["16 bit"], steps=2, cfg=4.0)
        for name in ("int8", "scaled"):
            ends = frozenset({"input_blocks.0.0", "out.2"})
            settings = BySensitivity(0, ends), NUMBER_FORMATS[name]
            how = Planner(monitor.statistics(), *settings)
            found[name] = load_checkpoint(str(path), how, only_model=True)[0]
    return found


class TestTrained:
    """On weights that draw pictures; the toy's random ones have heavier tails."""

    def test_is_nearer_to_16_bit_than_fp8(self, trained, legacy):
        exact, int8_one, fp8 = (sample(trained[n], steps=2) for n in ("16 bit", "int8", "scaled"))
        assert 0 < distance(int8_one, exact) < 0.6 * distance(fp8, exact)

    # Layers whose change is seen in a picture well above what a GPU rounds in 16 bit.
    @pytest.mark.parametrize(
        "layer", ["output_blocks.1.1.proj_out", "output_blocks.5.0.in_layers.2"]
    )
    def test_a_lora_on_one_layer_has_its_effect_within_two_percent(self, trained, legacy, layer):
        exact = weight(load(trained["16 bit"]), layer)
        numbers, tail = torch.Generator().manual_seed(0), exact.shape[2:]
        prefix = "lora_unet_" + layer.replace(".", "_")
        file = {
            f"{prefix}.lora_up.weight": torch.randn(
                len(exact), 4, *[1] * len(tail), generator=numbers
            ),
            f"{prefix}.lora_down.weight": torch.randn(
                4, exact.shape[1], *tail, generator=numbers
            ) * exact.std() * 4,
        }  # fmt: skip
        changes, effects = [], []
        for patcher in (trained["16 bit"], trained["int8"]):
            before = weight(load(patcher), layer)
            effects.append(effect(patcher, patched(patcher, file)))
            changes.append(weight(load(patched(patcher, file)), layer) - before)
            unload()
        assert effects[0].norm() > 0.05 * sample(trained["16 bit"]).norm()
        assert distance(changes[1], changes[0]) < 0.02
        # In a picture, the other layers' errors are added to what it does.
        along = (effects[1] * effects[0]).sum() / effects[0].square().sum()
        assert abs(along - 1) < 0.02
        assert distance(effects[1], effects[0]) < 0.15


class TestTensor:
    def made(self) -> QuantizedTensor:
        values = torch.randn((16, 24), generator=torch.Generator().manual_seed(0)) * 0.05
        return hold(*int8.quantize(values, values.abs().max()), torch.float16)

    def test_of_floats_into_it_quantizes_them(self):
        """ComfyUI's cache of hooked weights does that."""
        for factor in (3.0, 0.1):
            held_weight = self.made()
            values = held_weight.dequantize().float() * factor
            held_weight.data.copy_(values)
            error = (held_weight.dequantize().float() - values).norm() / values.norm()
            assert error < 0.01

    def test_requantized_by_chance_it_keeps_the_mean(self):
        held_weight = self.made()
        values = torch.full((16, 24), 0.3 * held_weight._params.scale.max().item())
        values[:, 0] = 127 * held_weight._params.scale[:, 0]
        again = held_weight.requantize_from_float(values, stochastic_rounding=7)
        assert again._params.scale.equal(held_weight._params.scale)
        found = again.dequantize().float()[:, 1:]
        assert len(found.unique()) > 2
        assert found.mean() == pytest.approx(values[:, 1:].mean().item(), rel=0.1)

    @pytest.mark.parametrize(
        "copies", [torch.clone, copy.deepcopy, lambda one: one.to("cpu", copy=True)]
    )
    def test_copies_share_nothing(self, copies):
        held_weight = self.made()
        copied = copies(held_weight)
        assert copied._qdata.equal(held_weight._qdata)
        copied._qdata.zero_()
        copied._params.scale.zero_()
        assert held_weight.dequantize().any()

    def test_what_torch_saves_are_real_values(self, tmp_path):
        held_weight = self.made()
        torch.save({"weight": held_weight}, tmp_path / "saved.pt")
        found = torch.load(tmp_path / "saved.pt", weights_only=True)["weight"]
        expected = dequantize(held_weight._qdata, held_weight._params.scale, torch.float16)
        assert found.equal(expected)


def test_is_saved_as_the_16_bit_weights_it_stands_for(ours):
    network = ours.model.diffusion_model.state_dict()
    saved = ours.model.state_dict_for_saving(network)
    for layer in (LINEAR, CONV):
        expected = network[f"{layer}.weight"].dequantize().cpu()
        assert saved[f"model.diffusion_model.{layer}.weight"].cpu().equal(expected)


def test_compiled_it_computes_the_same(ours):
    torch.compiler.reset()
    latent = sample(ours)
    clone = ours.clone(disable_dynamic=True)
    keys = ["diffusion_model.middle_block.0.in_layers", "diffusion_model.time_embed"]
    set_torch_compile_wrapper(clone, "aot_eager", keys=keys, fullgraph=True)
    assert distance(sample(clone), latent) < (0.02 if torch.cuda.is_available() else 1e-3)
    torch.compiler.reset()
