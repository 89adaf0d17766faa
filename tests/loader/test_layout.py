"""The quantized weight as a tensor: copied, moved and patched, in and out of inference mode."""

from __future__ import annotations

import dataclasses

import comfy.quant_ops
import pytest
import torch
from comfy.model_management import cast_to, get_offload_stream
from hswq.loader.engine.layout import LAYOUT, QuantizedTensor, hold
from hswq.loader.engine.matmul import scale_input
from hswq.quant import FP8_MAX, int8, quantize

INSIDE = [True, False]


def made(inside: bool, dtype=torch.float16, shape=(16, 24)) -> QuantizedTensor:
    """Return a weight that was made in or out of inference mode."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    with torch.inference_mode(inside), torch.no_grad():
        data, scale = quantize(values, 0.9 * values.abs().max(), scaled=True)
        return hold(data.clone(), scale.clone(), dtype)


def of_kind(kind: str, inside: bool) -> QuantizedTensor:
    """Return a weight of a number format, with all that its layout may hold beside the bytes."""
    if kind == "int8":
        with torch.inference_mode(inside), torch.no_grad():
            values = made(inside).dequantize().float()
            return hold(*int8.quantize(values, values.abs().max()), torch.float16)
    weight = made(inside)
    if kind == "fp8 with input_scale":
        scale_input(weight, 3.0)
    return weight


def same_bytes(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return a._qdata.view(torch.uint8).equal(b._qdata.view(torch.uint8)) and (
        a._params.scale.equal(b._params.scale)
    )


def apart(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two share no memory."""
    pairs = ((a._qdata, b._qdata), (a._params.scale, b._params.scale))
    return all(one.data_ptr() != other.data_ptr() for one, other in pairs)


@pytest.fixture(params=INSIDE, ids=["made inside", "made outside"])
def weight(request) -> QuantizedTensor:
    return made(request.param)


@pytest.fixture(params=INSIDE, ids=["used inside", "used outside"])
def mode(request):
    """Whether inference mode is on while the test runs."""
    with torch.inference_mode(request.param), torch.no_grad():
        yield request.param


COPIES = {
    "to(copy)": lambda weight: weight.to(device="cpu", copy=True),
    "to(dtype, copy)": lambda weight: weight.to(dtype=torch.float16, copy=True),
    "clone": lambda weight: weight.clone(),
}
CASTS = {
    "to(dtype)": lambda weight: weight.to(torch.float32),
    "to(dtype, copy)": lambda weight: weight.to(dtype=torch.float32, copy=True),
    "to(device, dtype)": lambda weight: weight.to(torch.device("cpu"), torch.float32),
    "to(other)": lambda weight: weight.to(torch.zeros(1)),
    "float": lambda weight: weight.float(),
}


class TestCopying:
    @pytest.mark.parametrize("copy", COPIES)
    def test_is_a_copy(self, weight, mode, copy):
        """Or ComfyUI's backup of a weight would be the weight itself."""
        copied = COPIES[copy](weight)
        assert isinstance(copied, QuantizedTensor)
        assert same_bytes(copied, weight)
        assert apart(copied, weight)

    @pytest.mark.parametrize("cast", CASTS)
    def test_cast_keeps_the_bytes(self, weight, mode, cast):
        """And stays quantized: real values in the wider dtype, not 16-bit ones made wider."""
        wide = CASTS[cast](weight)
        assert isinstance(wide, QuantizedTensor)
        assert same_bytes(wide, weight)
        exact = weight._qdata.float() * weight._params.scale
        assert wide.dequantize().equal(exact)
        assert weight.dtype == weight._params.orig_dtype == torch.float16

    def test_into_it(self, weight, mode):
        source = made(mode)
        source._qdata.zero_()
        if weight.is_inference() and not mode:  # torch allows it to nobody
            with pytest.raises(RuntimeError, match="inference"):
                weight.copy_(source)
            return
        weight.copy_(source)
        assert same_bytes(weight, source)
        assert apart(weight, source)

    def test_of_floats_into_it_quantizes_them(self, mode):
        """ComfyUI's cache of hooked weights does that."""
        weight = made(mode)
        values = weight.dequantize().float() * 3
        weight.data.copy_(values)
        assert weight.dequantize().dtype == torch.float16
        error = (weight.dequantize().float() - values).abs() / values.abs().clamp(min=1e-4)
        assert error.max() < 0.07

    def test_out_of_it_into_floats(self, weight, mode):
        values = torch.empty(weight.shape)
        values.copy_(weight)
        assert values.equal(weight.dequantize().float())


VIEWS = {
    "flatten": lambda tensor: tensor.flatten(),
    "view": lambda tensor: tensor.view(-1),
    "reshape": lambda tensor: tensor.reshape(24, 16),
    "squeeze": lambda tensor: tensor.squeeze(),
    "t": lambda tensor: tensor.t(),
    "transpose": lambda tensor: tensor.transpose(0, 1),
    "narrow": lambda tensor: tensor.narrow(0, 2, 4),
    "row": lambda tensor: tensor[3],
}


class TestRoomFor:
    """What ComfyUI allocates for a layer that it streams, before it copies the layer there."""

    def test_is_on_the_device(self, weight, mode):
        room = torch.empty_like(weight, device="meta", dtype=torch.float32)
        assert isinstance(room, QuantizedTensor)
        assert room._qdata.is_meta
        assert room._params.scale.is_meta
        assert (room.dtype, room.shape) == (torch.float32, weight.shape)

    def test_copies_nothing(self, weight, mode):
        """A copy of the scale would wait for the GPU: in each step, for each streamed layer."""
        with torch.profiler.profile(acc_events=True) as profile:
            torch.empty_like(weight, device="meta")
        names = {event.name for event in profile.events()}
        assert "aten::empty_like" in names
        assert not names & {"aten::clone", "aten::copy_", "aten::_to_copy"}

    @pytest.mark.gpu
    @pytest.mark.parametrize("pinned", [True, False])
    @pytest.mark.parametrize("kind", ["fp8", "fp8 with input_scale", "int8"])
    def test_is_filled_without_a_wait(self, mode, kind, pinned):
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        weight, device = of_kind(kind, mode), torch.device("cuda", 0)
        if pinned:
            data = weight._qdata.pin_memory()
            weight = weight._copy_with(qdata=data, params=weight._params, clone_params=False)
        stream = get_offload_stream(device)
        cast_to(weight, device=device, non_blocking=True, stream=stream)  # allocates all
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)
        torch.cuda.set_sync_debug_mode("error")
        try:
            there = cast_to(weight, device=device, non_blocking=True, stream=stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not stream.query()
        torch.cuda.synchronize()
        assert same_bytes(there.cpu(), weight)


class TestReading:
    @pytest.mark.parametrize("view", VIEWS)
    def test_a_part_of_it_or_another_shape(self, weight, mode, view):
        """Nodes that look at weights do that, such as Extract and Save LoRA."""
        found, expected = VIEWS[view](weight), VIEWS[view](weight.dequantize())
        assert found.shape == expected.shape
        assert (found + 0).allclose(expected, rtol=2e-3)  # comfy_kitchen multiplies in FP16

    def test_its_memory_in_order_is_that_of_a_float_tensor(self, weight, mode):
        """What saves tensors asks for this first, and then reads as many bytes as floats take."""
        values = weight.contiguous()
        assert type(values) is torch.Tensor
        assert values.equal(weight.dequantize())


class TestDetaching:
    def test_shares_its_memory(self, weight, mode):
        for detached in (weight.detach(), weight.data, torch.nn.Parameter(weight, False)):
            assert detached._qdata.data_ptr() == weight._qdata.data_ptr()
            assert detached._params.scale.data_ptr() == weight._params.scale.data_ptr()

    def test_setting_its_data_sets_bytes_and_scale(self, mode):
        weight, other = torch.nn.Parameter(made(mode), False), made(mode, shape=(16, 24))
        other._params.scale.mul_(2)
        weight.data.copy_(other)
        assert same_bytes(weight, other)


class TestRequantizing:
    def requantized(self, weight: QuantizedTensor, values: torch.Tensor, seed: int = 0):
        return weight.requantize_from_float(values, scale="recalculate", stochastic_rounding=seed)

    def test_of_its_own_values_gives_its_bytes(self, weight, mode):
        for dtype in (torch.float32, torch.float16):
            values = weight.to(dtype).dequantize()
            for seed in (0, 7):
                assert same_bytes(self.requantized(weight, values, seed), weight)

    @pytest.mark.parametrize("factor", [0.001, 0.6, 1.02, 1.5, 40.0])
    def test_moves_the_scale_by_octaves(self, weight, mode, factor):
        values = weight.float().dequantize() * factor
        after = self.requantized(weight, values)
        octaves = torch.log2(after._params.scale / weight._params.scale)
        assert octaves == octaves.round()
        assert 0.5 * FP8_MAX * 464 / 448 <= values.abs().max() / after._params.scale <= 464

    def test_of_zeros_and_without_a_scale_before(self, weight, mode):
        nothing = self.requantized(weight, torch.zeros(weight.shape))
        assert not nothing.dequantize().any()
        assert nothing._params.scale.equal(weight._params.scale)
        fresh = QuantizedTensor.from_float(torch.zeros(2, 2), LAYOUT)
        assert fresh._params.scale == 1
        fresh = QuantizedTensor.from_float(torch.full((2, 2), 3.0), LAYOUT)
        assert fresh.dequantize().allclose(torch.tensor(3.0))

    def test_keeps_the_effect_of_small_changes_on_average(self, weight, mode):
        """Changes below the grid's steps: rounding to the nearest would lose them all."""
        values = weight.float().dequantize()
        change = 0.01 * values.abs().mean()
        seeds = range(1, 65)
        mean = sum(self.requantized(weight, values + change, s).dequantize() for s in seeds) / 64
        assert ((mean - values).mean() / change - 1).abs() < 0.2
        nearest = self.requantized(weight, values + change).dequantize()
        assert (nearest - values).mean() / change < 0.5


class TestInputScale:
    """What a product in FP8 scales the input by is beside the weight, wherever that goes."""

    @pytest.fixture
    def scaled(self, weight) -> QuantizedTensor:
        with torch.inference_mode(weight.is_inference()):
            scale = torch.tensor(0.125)
        weight._params = dataclasses.replace(weight._params, input_scale=scale)
        return weight

    @pytest.mark.parametrize("change", COPIES | CASTS)
    def test_goes_along(self, scaled, mode, change):
        after = (COPIES | CASTS)[change](scaled)
        assert after._params.input_scale == 0.125
        if change in COPIES:
            shared = after._params.input_scale.data_ptr() == scaled._params.input_scale.data_ptr()
            assert not shared

    def test_outlasts_a_patch(self, scaled, mode):
        for seed in (0, 7):
            after = scaled.requantize_from_float(
                scaled.dequantize() * 3, scale="recalculate", stochastic_rounding=seed
            )
            assert after._params.input_scale == 0.125
            assert after._params.scale != scaled._params.scale
        if scaled.is_inference() <= mode:
            scaled.copy_(after)
            assert same_bytes(scaled, after)
            assert scaled._params.input_scale == 0.125

    def test_is_a_part_of_the_tensor_for_memory_management(self, scaled, mode):
        names, context = scaled.__tensor_flatten__()
        inner = {name: getattr(scaled, name) for name in names}
        assert len(names) == 3
        again = type(scaled).__tensor_unflatten__(inner, context, None, None)
        assert again._params.input_scale is scaled._params.input_scale
        assert again._params.to_device(torch.device("meta")).input_scale.is_meta


class TestComfyUI:
    def test_knows_it(self, weight):
        """It pins memory by the class's name, and checks for its own class elsewhere."""
        assert isinstance(weight, comfy.quant_ops.QuantizedTensor)
        assert type(weight).__name__ == comfy.quant_ops.QuantizedTensor.__name__
        assert weight.nbytes == weight.numel()
