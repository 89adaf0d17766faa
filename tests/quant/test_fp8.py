"""The number format: rounding in the search, and the stored tensors."""

import math

import numpy as np
import pytest
import reference
import torch
from helpers import DTYPES, gaussian
from hswq.quant import FP8_MAX, dequantize, fp8, quantize
from hswq.quant.fp8 import gated_input, positive_grid, quantize_input, quotient, round_to_grid

GRID = torch.tensor(sorted({abs(value) for value in reference.GRID}), dtype=torch.float32)
MIDPOINTS = (GRID[1:] + GRID[:-1]) / 2
ALL_BYTES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def nan_free(values: torch.Tensor) -> bool:
    return not values.to(torch.float32).isnan().any()


class TestPositiveGrid:
    def test_has_every_magnitude_once(self, device):
        assert torch.equal(positive_grid(device).cpu(), GRID)
        assert len(GRID) == 127
        assert GRID[-1] == FP8_MAX


class TestQuotient:
    def test_is_correctly_rounded(self, device):
        values = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + 1e-3
        by_number = quotient(values.to(device), 448.0).cpu()
        of_number = quotient(448.0, values.to(device)).cpu()
        assert torch.equal(by_number, (values.double() / 448).float())
        assert torch.equal(of_number, (448 / values.double()).float())


class TestRoundToGrid:
    def test_keeps_grid_values(self, device):
        assert torch.equal(round_to_grid(GRID.to(device)).cpu(), GRID)

    def test_ties_go_to_the_smaller_magnitude(self, device):
        assert torch.equal(round_to_grid(MIDPOINTS.to(device)).cpu(), GRID[:-1])

    def test_one_step_beside_a_tie(self, device):
        above = torch.nextafter(MIDPOINTS, torch.full_like(MIDPOINTS, 1e3))
        below = torch.nextafter(MIDPOINTS, torch.zeros_like(MIDPOINTS))
        assert torch.equal(round_to_grid(above.to(device)).cpu(), GRID[1:])
        assert torch.equal(round_to_grid(below.to(device)).cpu(), GRID[:-1])

    def test_what_is_tinier_than_the_grid(self, device):
        tiny = torch.tensor([0.0, 1e-45, 1e-38, 1e-10, 2.0**-10], device=device)
        assert not round_to_grid(tiny).any()

    @pytest.mark.parametrize("exponent", range(-11, 9))
    def test_is_the_nearest_everywhere(self, exponent, device):
        numbers = torch.Generator().manual_seed(exponent)
        values = (torch.rand(500, generator=numbers) + 0.5) * 2.0**exponent
        values = values.clamp(max=FP8_MAX)
        expected = torch.from_numpy(reference.nearest(values.numpy())).float()
        assert torch.equal(round_to_grid(values.to(device)).cpu(), expected)

    def test_any_layout(self):
        values = torch.rand(6, 4).t()[::2]
        assert torch.equal(round_to_grid(values), round_to_grid(values.contiguous()))


class TestQuantize:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_all_bytes_come_back_unscaled(self, dtype, device):
        finite = ALL_BYTES[~ALL_BYTES.float().isnan()].to(device)
        weight = dequantize(finite, torch.ones((), device=device), dtype)
        stored, scale = quantize(weight, FP8_MAX, scaled=False)
        assert torch.equal(stored.view(torch.uint8), finite.view(torch.uint8))
        assert scale.item() == 1

    @pytest.mark.parametrize("amax", [0.03, 1.0, 448.0, 7000.0])
    def test_all_bytes_come_back_scaled(self, amax, device):
        finite = ALL_BYTES[~ALL_BYTES.float().isnan()].to(device)
        scale = torch.tensor(amax / 448, dtype=torch.float32, device=device)
        stored, found = quantize(dequantize(finite, scale, torch.float32), scale * 448, scaled=True)
        assert torch.equal(stored.view(torch.uint8), finite.view(torch.uint8))
        assert found.item() == pytest.approx(scale.item(), rel=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scale_is_an_fp32_scalar_on_the_weights_device(self, dtype, device):
        weight = gaussian(3, 4).to(device, dtype)
        amax = torch.tensor(0.05, device=device)
        for scaled, expected in ((False, 1.0), (True, np.float32(0.05) / np.float32(448))):
            stored, scale = quantize(weight, amax, scaled=scaled)
            assert (stored.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
            assert (stored.device, scale.device) == (weight.device, weight.device)
            assert (stored.shape, scale.shape) == (weight.shape, ())
            assert scale.item() == expected

    @pytest.mark.parametrize("scaled", [False, True])
    def test_amax_may_be_a_number_or_a_tensor(self, scaled):
        weight = gaussian(8, 8)
        number, tensor = 0.0314, torch.tensor(0.0314, dtype=torch.float64)
        for one, other in zip(
            quantize(weight, number, scaled=scaled),
            quantize(weight, tensor, scaled=scaled),
            strict=True,
        ):
            assert torch.equal(one.float(), other.float())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scaled", [False, True])
    def test_clips_at_amax(self, scaled, dtype):
        weight = torch.tensor([-3.0, -0.5, 0.25, 0.5, 0.75, 60000.0], dtype=dtype)
        stored, scale = quantize(weight, 0.5, scaled=scaled)
        values = dequantize(stored, scale, torch.float32)
        assert torch.equal(values, torch.tensor([-0.5, -0.5, 0.25, 0.5, 0.5, 0.5]))

    @pytest.mark.parametrize("amax", [448.0, 449.0, 1e4, 3e38])
    def test_unscaled_clips_at_448(self, amax):
        weight = torch.tensor([-1e30, -449.0, 464.0, 465.0, 1e5])
        stored, _ = quantize(weight, amax, scaled=False)
        assert torch.equal(stored.float().abs(), torch.full((5,), 448.0))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scaled", [False, True])
    def test_infinite_weights_are_clipped_and_nan_stays(self, scaled, dtype, device):
        weight = torch.tensor([math.inf, -math.inf, math.nan, 0.25], device=device).to(dtype)
        stored, scale = quantize(weight, 0.5, scaled=scaled)
        values = dequantize(stored, scale, torch.float32).cpu()
        assert values[[0, 1, 3]].tolist() == [0.5, -0.5, 0.25]
        assert values[2].isnan()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-30, 1e-7, 65504.0, 1e30, 3e38])
    def test_never_makes_nan(self, magnitude, dtype, device):
        limit = torch.finfo(dtype).max
        weight = torch.tensor([0.0, magnitude, -magnitude, magnitude / 3], dtype=torch.float64)
        weight = weight.clamp(-limit, limit).to(device, dtype)
        amax = max(weight.abs().max().item(), 1e-7)
        for scaled in (False, True):
            stored, scale = quantize(weight, amax, scaled=scaled)
            assert nan_free(stored)
            assert nan_free(dequantize(stored, scale, torch.float32))

    def test_does_not_change_its_input(self):
        weight = gaussian(8, 8)
        before = weight.clone()
        for scaled in (False, True):
            quantize(weight, 0.01, scaled=scaled)
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("amax", [0.5, 448.0, 2000.0])
    def test_every_16_bit_number_is_cast_as_torch_casts_it(self, amax, dtype, device):
        numbers = torch.arange(1 << 16).to(torch.uint16).view(dtype).to(device)
        for scaled, factor in ((False, 1.0), (True, 448 / amax)):
            stored, _ = quantize(numbers, amax, scaled=scaled)
            wide = (numbers.float() * factor).to(dtype if dtype is torch.float16 else torch.float32)
            bound = 448.0 if scaled else min(amax, 448.0)
            expected = wide.clamp(-bound, bound).to(torch.float8_e4m3fn)
            assert torch.equal(stored.float().isnan(), expected.float().isnan())
            assert torch.equal(stored.float().nan_to_num(7), expected.float().nan_to_num(7))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scaled", [False, True])
    def test_any_size(self, scaled, dtype, device):
        """It is done in pieces on the CPU."""
        weight = gaussian(200, 1511 * torch.get_num_threads()).to(device, dtype)
        whole, _ = quantize(weight, 0.03, scaled=scaled)
        rows = [quantize(row, 0.03, scaled=scaled)[0].float() for row in weight]
        assert torch.equal(whole.float(), torch.stack(rows))
        assert whole.shape == weight.shape

    @pytest.mark.parametrize("scaled", [False, True])
    def test_any_layout(self, scaled, device):
        weight = gaussian(6, 4, 3, 3).to(device)
        expected, _ = quantize(weight, 0.03, scaled=scaled)
        for other in (weight.to(memory_format=torch.channels_last), weight.mT.contiguous().mT):
            stored, _ = quantize(other, 0.03, scaled=scaled)
            assert torch.equal(stored.float(), expected.float())


@pytest.fixture
def fp8_rounds(device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("Triton has no FP8 on this NVIDIA GPU, or goes through FP16 to it")


class TestQuantizeInput:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("amax", [0.02, 3.0, 448.0, 30000.0])
    def test_is_the_nearest_of_the_quotient(self, dtype, amax, device, fp8_rounds):
        values = (gaussian(64, 300) * amax * 25).to(dtype)
        scale = torch.tensor(amax / 448)
        expected = (values.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
        found = quantize_input(values.to(device), scale.to(device))
        assert found.shape == values.shape
        assert torch.equal(found.float().cpu(), expected.float())
        assert (expected.float().abs() == 448).any()

    def test_infinite_values_are_clipped_and_nan_stays(self, device, fp8_rounds):
        values = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=torch.float16)
        before = values.clone()
        found = quantize_input(values.to(device), torch.tensor(0.5, device=device)).float().cpu()
        assert found[[0, 1, 3]].tolist() == [448.0, -448.0, 2.0]
        assert found[2].isnan()
        assert values[[0, 1, 3]].equal(before[[0, 1, 3]])


class TestGatedInput:
    """GEGLU, and then quantize_input where there is a scale."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(7, 96), (300, 2560), (1, 2)])
    def test_is_geglu_but_for_rounding(self, shape, dtype, device):
        values = (150 * gaussian(*shape)).to(device, dtype)
        gated, gates = values.double().chunk(2, -1)
        expected = gated * gates * torch.special.ndtr(gates)
        found = gated_input(values)
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        # 1 + erf(gate) has few digits left where it is nearly 0.
        torch.testing.assert_close(
            found.double(), expected, rtol=1.5 * torch.finfo(dtype).eps, atol=1e-5
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_in_fp8_is_that_rounded_once_more(self, dtype, device, fp8_rounds):
        values = (100 * gaussian(40, 256)).to(device, dtype)
        scale = torch.tensor(0.01, device=device)
        found = gated_input(values, scale)
        assert found.dtype is torch.float8_e4m3fn
        assert torch.equal(found.float(), quantize_input(gated_input(values), scale).float())
        assert found.float().abs().max() == FP8_MAX

    def test_infinite_values_are_clipped_and_nan_stays(self, device, fp8_rounds):
        values = torch.ones(1, 32, dtype=torch.float16, device=device)
        values[0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
        found = gated_input(values, torch.tensor(0.5, device=device)).float().cpu()[0]
        assert found[:2].tolist() == [FP8_MAX, -FP8_MAX]
        assert found[2].isnan()
        assert found[3:].isfinite().all()


class TestDequantize:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_product_in_fp32(self, dtype, device):
        scale = torch.tensor(0.0123)
        expected = (ALL_BYTES.float() * scale).to(dtype)
        found = dequantize(ALL_BYTES.to(device), scale.to(device), dtype).cpu()
        assert found.dtype == dtype
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))

    def test_fp16_does_not_overflow_on_the_way(self, device):
        # Both 448 / scale and 448 * 448 are beyond FP16; the product is not.
        stored = torch.tensor([448.0, -448.0], device=device).to(torch.float8_e4m3fn)
        scale = torch.tensor(2.0**7, device=device)
        assert dequantize(stored, scale, torch.float16).tolist() == [57344.0, -57344.0]

    @pytest.mark.parametrize("old_card", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [1.0, 0.0123, 3 / FP8_MAX])
    def test_is_the_same_compiled(self, device, monkeypatch, old_card, dtype, scale):
        constant = torch.compiler.assume_constant_result(lambda: old_card)
        monkeypatch.setattr(fp8, "compilers_lack_fp8", constant)
        torch.compiler.reset()
        scale = torch.tensor(scale, device=device)
        compiled = torch.compile(dequantize, backend="aot_eager", fullgraph=True)
        found, expected = (
            function(ALL_BYTES.to(device), scale, dtype) for function in (compiled, dequantize)
        )
        assert found.dtype is dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
