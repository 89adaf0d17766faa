"""Compensated rounding: GPTQ's result from a sketch, in the bytes of nearest rounding's format."""

import math

import pytest
import torch
from helpers import DTYPES, gaussian, generator, inputs_of, sketch_of
from hswq.quant import (
    compensate,
    compensate_kernels,
    dequantize,
    kernels,
    output_error,
    quantize,
    quantize_compensated,
)
from hswq.quant.feedback import feedback_of
from hswq.quant.fp8 import storing_of

SHAPES = [(40, 96), (24, 70, 3, 3), (5, 33, 1, 1), (3, 1)]


def true_error(weight: torch.Tensor, quantized: tuple, inputs: torch.Tensor) -> float:
    """Return |(W - Q) x| / |W x| over inputs (rows, in) of a Linear."""
    weight = weight.float()
    rest = weight - dequantize(*quantized, torch.float32)
    return ((inputs @ rest.mT).norm() / (inputs @ weight.mT).norm()).item()


def gptq(columns: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return (C, rows) whole numbers, by GPTQ as its paper has it, with an inverse of C x C."""
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    left, rounded = columns.clone(), torch.empty_like(columns)
    for index in range(len(columns)):
        rounded[index] = left[index].round()
        rest = (left[index] - rounded[index]) / upper[index, index]
        left[index + 1 :] -= upper[index, index + 1 :, None] * rest
    return rounded


class TestFeedback:
    @pytest.mark.parametrize("channels", [1, 7, 64, 65, 200])
    @pytest.mark.parametrize("damping", [0.02, 0.7])
    def test_gives_what_gptq_gives(self, channels, damping, monkeypatch):
        sketch = sketch_of(inputs_of(channels), 24).double()
        found = feedback_of(sketch, damping)
        columns = 30 * torch.randn(channels, 50, generator=generator(3)).double()
        ordered = sketch[:, found.order] / sketch.square().sum(0).mean().sqrt()
        gram = ordered.mT @ ordered + damping * torch.eye(channels)
        error = torch.zeros(len(sketch), 50).double()
        rounded = torch.empty_like(columns)
        for index, column in enumerate(columns):
            rounded[index] = (column + found.answers[index].double() @ error).round()
            rest = column - rounded[index]
            error += found.directions[index].double()[:, None] * rest
        # FP32 answers round a value otherwise where it lies next to a middle.
        assert (rounded != gptq(columns, gram)).float().mean() < 0.001

    def test_takes_the_largest_inputs_first(self):
        sketch = sketch_of(inputs_of(40))
        powers = sketch.square().sum(0)[feedback_of(sketch).order]
        assert (powers.diff() <= 0).all()

    def test_the_sketchs_scale_does_not_matter(self):
        sketch = sketch_of(inputs_of(90))
        one, other = feedback_of(sketch), feedback_of(sketch * 2.0**30)
        assert torch.equal(one.answers, other.answers)
        assert torch.equal(one.directions, other.directions)

    def test_an_input_that_dwarfs_all_others(self):
        sketch = sketch_of(inputs_of(100))
        sketch[:, 17] *= 1e9
        assert feedback_of(sketch).answers.isfinite().all()


class TestQuantizeCompensated:
    @pytest.mark.parametrize("scaled", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_outputs_are_closer_than_by_rounding_to_nearest(self, scaled, dtype, device):
        weight, inputs = gaussian(64, 160).to(dtype), inputs_of(160)
        others, amax = inputs_of(160)[::2], weight.abs().max().item()
        found = quantize_compensated(
            weight.to(device), amax, sketch_of(inputs).to(device), scaled=scaled
        )
        nearest = quantize(weight.to(device), amax, scaled=scaled)
        assert found[0].dtype is torch.float8_e4m3fn and torch.equal(found[1], nearest[1])
        mine, theirs = (
            true_error(weight, (q.cpu(), scale.cpu()), others) for q, scale in (found, nearest)
        )
        assert mine < 0.5 * theirs

    @pytest.mark.parametrize("shape", SHAPES)
    def test_keeps_the_weight_as_it_is(self, shape, device):
        weight = gaussian(*shape).to(device)
        before = weight.clone()
        found, scale = quantize_compensated(
            weight, 0.05, sketch_of(inputs_of(shape[1])), scaled=True
        )
        assert torch.equal(weight, before)
        assert found.shape == weight.shape and found.is_contiguous()
        assert found.device == scale.device == weight.device
        assert not found.float().isnan().any()

    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_same_every_time(self, shape, device):
        weight, sketch = gaussian(*shape).to(device), sketch_of(inputs_of(shape[1])).to(device)
        one, other = (quantize_compensated(weight, 0.05, sketch, scaled=True)[0] for _ in range(2))
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))

    def test_a_convolutions_kernel_places_are_layers_of_their_own(self):
        weight, sketch = gaussian(10, 48, 3, 2), sketch_of(inputs_of(48))
        whole = quantize_compensated(weight, 0.06, sketch, scaled=True)[0].float()
        for height in range(3):
            for width in range(2):
                place = weight[:, :, height, width]
                found = quantize_compensated(place, 0.06, sketch, scaled=True)[0].float()
                different = (found != whole[:, :, height, width]).float().mean()
                assert different < 0.01  # sums of other sizes add up in another order

    @pytest.mark.parametrize("scaled", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_channels_whose_input_was_always_0_are_rounded_to_nearest(self, dtype, scaled, device):
        weight, sketch = gaussian(30, 80).to(dtype).to(device), sketch_of(inputs_of(80))
        sketch[:, 20:50] = 0
        found, nearest = (
            one[0].view(torch.uint8)
            for one in (
                quantize_compensated(weight, 0.05, sketch, scaled=scaled),
                quantize(weight, 0.05, scaled=scaled),
            )
        )
        assert torch.equal(found[:, 20:50], nearest[:, 20:50])
        assert not torch.equal(found, nearest)

    @pytest.mark.parametrize("scaled", [True, False])
    def test_weights_beyond_amax_are_clipped(self, scaled, device):
        weight = torch.cat((gaussian(8, 20), 1000 * gaussian(8, 20)), 1).to(device)
        found, _ = quantize_compensated(weight, 0.05, sketch_of(inputs_of(40)), scaled=scaled)
        largest = 448.0 if scaled else torch.tensor(0.05).to(torch.float8_e4m3fn).item()
        assert found.float().abs().max() == largest

    @pytest.mark.parametrize(
        "sketch",
        [
            None,
            torch.zeros(128, 30),
            torch.zeros(0, 30),
            torch.full((128, 30), torch.nan),
            sketch_of(inputs_of(30)).index_fill(1, torch.tensor([4]), torch.inf),
            sketch_of(inputs_of(60)),
            torch.ones(128),
        ],
        ids=["none", "zeros", "no rows", "nan", "inf", "of grouped channels", "of no channels"],
    )
    def test_without_a_sketch_that_fits_as_quantize(self, sketch, device):
        weight = gaussian(20, 30).to(device)
        assert compensate.usable_rows(weight, sketch) is None
        found, nearest = (
            one[0].view(torch.uint8)
            for one in (
                quantize_compensated(weight, 0.05, sketch, scaled=True),
                quantize(weight, 0.05, scaled=True),
            )
        )
        assert torch.equal(found, nearest)

    def test_a_weight_that_is_not_finite_as_quantize(self):
        weight = gaussian(20, 30)
        weight[3, 4] = torch.inf
        found = quantize_compensated(weight, 0.05, sketch_of(inputs_of(30)), scaled=True)[0]
        assert torch.equal(found.float(), quantize(weight, 0.05, scaled=True)[0].float())

    def test_inputs_that_are_all_alike(self, device):
        """Their Gram has rank 1: one column can make up for all others."""
        weight = gaussian(50, 40).to(device)
        inputs = torch.randn(2000, 1, generator=generator(0)) @ torch.ones(1, 40)
        found = quantize_compensated(weight, 0.08, sketch_of(inputs), scaled=True)
        nearest = quantize(weight, 0.08, scaled=True)
        mine, theirs = (
            true_error(weight.cpu(), tuple(part.cpu() for part in one), inputs)
            for one in (found, nearest)
        )
        assert mine < 0.2 * theirs


class TestOutputError:
    def test_says_what_other_inputs_show(self, device):
        weight, inputs = gaussian(200, 120), inputs_of(120)
        sketch, others = sketch_of(inputs), inputs_of(120)[1::2]
        for rounding in (quantize, lambda *a, **k: quantize_compensated(*a, sketch, **k)):
            found = rounding(weight.to(device), 0.08, scaled=True)
            said = float(output_error(weight.to(device), *found, sketch))
            real = true_error(weight, tuple(part.cpu() for part in found), others)
            # CHECKED rows of a sketch know a square sum to about sqrt(2 / CHECKED).
            assert said == pytest.approx(real, rel=math.sqrt(2 / compensate.CHECKED))

    def test_no_error(self):
        weight = torch.tensor([[1.0, -2.0], [0.5, 448.0]])
        found = quantize(weight, 448.0, scaled=True)
        assert output_error(weight, *found, torch.ones(32, 2)) == 0

    def test_unknown_inputs(self):
        weight = gaussian(4, 6)
        found = quantize(weight, 0.05, scaled=True)
        assert math.isnan(output_error(weight, *found, torch.zeros(32, 6)))
        assert math.isnan(output_error(weight, *found, torch.ones(32, 12)))


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.mark.parametrize("scaled", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_as_on_the_cpu(self, shape, dtype, scaled):
        if not torch.cuda.is_available():
            pytest.skip("this machine has no NVIDIA GPU")
        weight, sketch = gaussian(*shape).to(dtype), sketch_of(inputs_of(shape[1]))
        there, here = (
            quantize_compensated(weight.to(device), 0.06, sketch, scaled=scaled)[0].float().cpu()
            for device in ("cuda", "cpu")
        )
        assert (there != here).float().mean() < 0.02

    def test_the_kernel_and_torch_on_one_device(self):
        if not kernels.usable(torch.device("cuda")):
            pytest.skip("needs an NVIDIA GPU, for Triton")
        weight, sketch = gaussian(200, 320).cuda(), sketch_of(inputs_of(320)).cuda()
        found, storing = feedback_of(sketch), storing_of(weight, 0.06, scaled=True)
        columns = storing.scaled(weight.mT[found.order]).contiguous()
        error = torch.zeros(len(weight), len(sketch), device="cuda")
        one, other = (
            module.round_columns(
                columns, columns, error.clone(), found.answers, found.directions, storing
            ).view(torch.uint8)
            for module in (compensate, compensate_kernels)
        )
        assert (one != other).float().mean() < 0.02
