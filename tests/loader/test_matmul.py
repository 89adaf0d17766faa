"""Products in FP8: right where they run, and the ordinary ones everywhere else."""

from __future__ import annotations

import dataclasses
import logging
from types import MappingProxyType

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy_extras.nodes_model_advanced import ModelComputeDtype
from harness import inprocess
from harness.inprocess import (
    assert_same_effect,
    distance,
    held,
    load_partly,
    patched,
    same,
    sample,
    unload,
)
from harness.patches import patch_file
from helpers import make_planner
from hswq.calibration import DualMonitor, Statistics
from hswq.loader.engine import matmul
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.engine.operations import hswq_operations
from hswq.quant import FP8_MAX, Planner, SearchSettings, quantize

DTYPES = [torch.float16, torch.bfloat16]
QUICK = SearchSettings(bins=256, candidates=20, refinements=1)
DEVICE = comfy.model_management.get_torch_device()


@pytest.fixture(autouse=True)
def multiplies(monkeypatch):
    """What ComfyUI's option --supports-fp8-compute does; torch multiplies in FP8 on CPUs too."""
    monkeypatch.setattr(comfy.model_management, "SUPPORT_FP8_OPS", True)
    if not matmul.usable(DEVICE):
        pytest.skip(f"{DEVICE} has no FP8 matrix products")


def layer_of(
    dtype: torch.dtype, amax: float | None, *, bias: bool = True, sides: tuple[int, int] = (32, 48)
) -> torch.nn.Linear:
    """Return a quantized Linear that multiplies in FP8 if its input's amax is given."""

    def decide(_: str, weight: torch.Tensor, __: torch.device):
        return quantize(weight, 0.9 * weight.abs().max(), scaled=True)

    operations = hswq_operations(decide, manual_cast=False)
    layer = operations.Linear(*sides[::-1], bias=bias, device=DEVICE, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(sides, generator=generator) * 0.1}
    if bias:
        state["bias"] = torch.randn(sides[0], generator=generator)
    layer.load_state_dict({key: value.to(DEVICE, dtype) for key, value in state.items()})
    if matmul.fits(layer.weight):
        matmul.scale_input(layer.weight, amax)
    return layer


def inputs(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return values.to(DEVICE, dtype)


def in_float64(layer: torch.nn.Linear, values: torch.Tensor) -> torch.Tensor:
    """Return what the layer computes from rounded inputs, exactly."""
    params = layer.weight._params
    weight = layer.weight._qdata.double() * params.scale.double()
    scale = params.input_scale.double()
    rounded = (values.float() / params.input_scale).clamp(-FP8_MAX, FP8_MAX)
    rounded = rounded.to(torch.float8_e4m3fn).double() * scale
    bias = None if layer.bias is None else layer.bias.double()
    return torch.nn.functional.linear(rounded, weight, bias)


class TestProduct:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(48,), (2, 48), (2, 7, 48), (2, 3, 5, 48)])
    def test_is_that_of_the_rounded_inputs(self, dtype, bias, shape):
        layer, values = layer_of(dtype, 4.0, bias=bias), inputs(*shape, dtype=dtype)
        found, expected = layer(values), in_float64(layer, values)
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        assert distance(found.double(), expected) < (0.01 if dtype is torch.bfloat16 else 0.002)
        ordinary = layer_of(dtype, None, bias=bias)(values)
        assert 0.005 < distance(found, ordinary) < 0.06

    @pytest.mark.parametrize("view", [lambda v: v.mT, lambda v: v[:, ::2], lambda v: v[:1, :2]])
    def test_of_any_layout(self, view):
        layer, values = layer_of(torch.float16, 4.0), view(inputs(4, 48, 48))
        assert distance(layer(values).double(), in_float64(layer, values)) < 0.002

    def test_clips_inputs_larger_than_any_before(self):
        layer, values = layer_of(torch.float16, 1.0), inputs(9, 48)
        found = layer(values)
        assert found.isfinite().all()
        assert distance(found.double(), in_float64(layer, values)) < 0.002
        assert distance(found, layer(values.clamp(-1, 1))) < 1e-3

    def test_compiled_is_one_graph_and_the_same(self):
        torch.compiler.reset()
        layer, values = layer_of(torch.float16, 4.0), inputs(2, 7, 48)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert distance(compiled(values), layer(values)) < 1e-3

    def test_leaves_its_input_as_it_was(self):
        values = inputs(9, 48)
        before = values.clone()
        layer_of(torch.float16, 0.5)(values)
        assert values.equal(before)

    def test_nan_does_not_become_a_number(self):
        values = inputs(3, 48)
        values[1, 7] = torch.nan
        found = layer_of(torch.float16, 4.0)(values)
        assert found.isnan().any(1).tolist() == [False, True, False]


class TestOrdinary:
    """Where a product in FP8 is not possible."""

    @pytest.mark.parametrize("amax", [None, 0.0, 1e-40])
    def test_without_a_usable_amax(self, amax):
        assert layer_of(torch.float16, amax).weight._params.input_scale is None

    @pytest.mark.parametrize("sides", [(32, 24), (24, 32), (40, 40)])
    def test_with_sides_that_cannot(self, sides):
        layer = layer_of(torch.float16, 4.0, sides=sides)
        assert layer.weight._params.input_scale is None
        assert layer(inputs(3, sides[1])).isfinite().all()

    def test_of_fp32_inputs(self):
        """cuBLAS adds no bias to FP32 outputs."""
        one, other = (layer_of(torch.float32, amax) for amax in (4.0, None))
        values = inputs(3, 48, dtype=torch.float32)
        assert one(values).equal(other(values))

    def test_of_no_inputs(self):
        assert layer_of(torch.float16, 4.0)(inputs(0, 48)).shape == (0, 32)

    def test_with_a_function_on_the_weight(self):
        """A LoRA on an offloaded weight: its values are not FP8."""
        one, other = (layer_of(torch.float16, amax) for amax in (4.0, None))
        for layer in (one, other):
            layer.weight_function = [lambda weight: weight * 1.01]
        values = inputs(3, 48)
        assert one(values).equal(other(values))


@pytest.fixture(scope="module")
def measured(checkpoint) -> Statistics:
    """Statistics of the toy, recorded in a sampling."""
    with torch.inference_mode():
        patcher = comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), output_vae=False, output_clip=False,
            model_options={"dtype": torch.float16},
        )[0]  # fmt: skip
        with DualMonitor(patcher.model.diffusion_model) as monitor:
            sample(patcher, steps=4, cfg=4.0)
    return monitor.statistics()


class Loaded:
    """The toy with FP8 products and without, computing in FP16 as on a GPU."""

    def __init__(self, path: str, planner: Planner) -> None:
        self.ordinary = load_checkpoint(path, planner, only_model=True)[0]
        self.plan = self.ordinary.get_attachment(ATTACHMENT)
        self.fp8 = load_checkpoint(path, self.plan, fp8_matmul=True, only_model=True)[0]


@pytest.fixture(scope="module")
def pairs() -> dict[tuple, Loaded]:
    """The models of every mode and memory mode, loaded once."""
    return {}


@pytest.fixture
def pair(pairs, memory, checkpoint, measured):
    """Return a function that gives the models of one mode."""

    def of(*, scaled: bool = True) -> Loaded:
        if (memory, scaled) not in pairs:
            planner = make_planner(measured, 0.25, scaled=scaled, settings=QUICK)
            pairs[memory, scaled] = Loaded(str(checkpoint), planner)
        return pairs[memory, scaled]

    yield of
    unload()


def in_fp16(patcher: ModelPatcher) -> ModelPatcher:
    return ModelComputeDtype().patch(patcher, "fp16")[0]


def multiplying(patcher: ModelPatcher) -> set[str]:
    return {
        name.removesuffix(".weight")
        for name, weight in patcher.model.diffusion_model.named_parameters()
        if isinstance(weight, QuantizedTensor) and weight._params.input_scale is not None
    }


@pytest.fixture
def small(monkeypatch):
    """Small pictures: a CPU multiplies in FP8 number by number."""
    monkeypatch.setattr(inprocess, "LATENT", (1, 4, 8, 8))


@pytest.mark.usefixtures("small")
class TestLoaded:
    @pytest.mark.parametrize("scaled", [True, False])
    def test_every_quantized_linear_does_and_no_other_layer(self, pair, scaled):
        models = pair(scaled=scaled)
        network = models.fp8.model.diffusion_model
        quantized = {name: network.get_submodule(name) for name in models.plan.quantized}
        linear = {name for name, layer in quantized.items() if isinstance(layer, torch.nn.Linear)}
        assert multiplying(models.fp8) == linear
        assert 100 < len(linear) < len(quantized)
        assert not multiplying(models.ordinary)

    @pytest.mark.parametrize("scaled", [True, False])
    def test_pictures_are_near_and_weights_the_same(self, pair, scaled):
        models = pair(scaled=scaled)
        assert not same(held(models.fp8), held(models.ordinary))
        plain, ours = (sample(in_fp16(patcher)) for patcher in (models.ordinary, models.fp8))
        assert 1e-3 < distance(ours, plain) < 0.2

    def test_a_layer_without_a_recorded_amax_does_not(self, pair, checkpoint):
        plan = pair().plan
        unknown = {name for name in plan.quantized if "attn1" in name}
        layers = {
            name: dataclasses.replace(layer, input_amax=None) if name in unknown else layer
            for name, layer in plan.layers.items()
        }
        some = dataclasses.replace(plan, layers=MappingProxyType(layers))
        patcher = load_checkpoint(str(checkpoint), some, fp8_matmul=True, only_model=True)[0]
        assert unknown & multiplying(pair().fp8)
        assert multiplying(patcher) == multiplying(pair().fp8) - unknown

    def test_a_lora_has_its_effect_and_leaves_no_trace(self, pair):
        models = tuple(in_fp16(patcher) for patcher in (pair().ordinary, pair().fp8))
        before, latent = held(models[1]), sample(models[1])
        file = patch_file("LoRA")
        assert_same_effect(models, lambda patcher: patched(patcher, file))
        with_lora = patched(models[1], file)
        assert not sample(with_lora).equal(latent)
        assert multiplying(with_lora) == multiplying(models[1]) != set()
        assert sample(models[1]).equal(latent)
        unload()
        assert not same(held(models[1]), before)

    def test_offloaded_it_gives_the_same(self, pair, legacy):
        patcher = in_fp16(pair().fp8)
        latent = sample(patcher)
        unload()
        load_partly(patcher, 0.3)
        assert distance(sample(patcher), latent) < 1e-3

    def test_loaded_again_it_still_does(self, pair):
        ours = pair().fp8
        load, arguments = ours.cached_patcher_init
        for patcher in (ours.clone(disable_dynamic=True), load(*arguments, disable_dynamic=True)):
            assert multiplying(patcher) == multiplying(ours)
            assert not same(held(patcher), held(ours))
        load, arguments = pair().ordinary.cached_patcher_init
        assert not multiplying(load(*arguments))


class TestWithoutSupport:
    def test_the_ordinary_products_run_and_the_log_says_so(
        self, pair, checkpoint, monkeypatch, caplog
    ):
        models = pair()
        monkeypatch.setattr(comfy.model_management, "SUPPORT_FP8_OPS", False)
        if matmul.usable(DEVICE):
            pytest.skip(f"{DEVICE} has FP8 matrix products")
        with caplog.at_level(logging.INFO):
            ours = load_checkpoint(
                str(checkpoint), models.plan, fp8_matmul=True, only_model=True
            )[0]  # fmt: skip
        assert f"toy.safetensors: {DEVICE} has no FP8 matrix products" in caplog.text
        assert not multiplying(ours)
        assert sample(ours).equal(sample(models.ordinary))
