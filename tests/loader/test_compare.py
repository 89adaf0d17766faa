"""The comparison node's numbers are scikit-image's, and its errors say what is wrong."""

import math
from typing import NamedTuple

import pytest
import torch
from hswq.loader.nodes.compare import HSWQCompare
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

# FP32 against float64: SSIM's variances are differences of nearly equal means of squares, each
# right to 1e-7, beside a constant of 9e-4.
SSIM_TOLERANCE = 2e-4
PSNR_TOLERANCE = 1e-3  # dB


class Compared(NamedTuple):
    ssim: float
    psnr: float
    difference: Tensor


def compare(original: Tensor, image: Tensor, amplify: float = 1.0) -> Compared:
    node = HSWQCompare.PREPARE_CLASS_CLONE(None)  # as ComfyUI calls it, but shown nowhere
    return Compared(*node.execute(original, image, amplify).result)


def pictures(batch: int = 1, channels: int = 3, seed: int = 0) -> Tensor:
    """IMAGE (B, 40, 56, C): soft blotches, of which some are flat black and white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, 5, 7, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(40, 56), mode="bicubic")
    return (1.5 * fine - 0.25).clamp(0, 1).movedim(1, -1)


def disturbed(images: Tensor, strength: float) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def expected(original: Tensor, image: Tensor) -> tuple[float, float]:
    """Of one picture each, (H, W, C), with the window of SSIM's authors."""
    original, image = original.double().numpy(), image.double().numpy()
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similarity = structural_similarity(original, image, data_range=1.0, channel_axis=-1, **how)
    return similarity, peak_signal_noise_ratio(original, image, data_range=1.0)


class TestNumbers:
    @pytest.mark.parametrize("strength", [0.003, 0.03, 0.3])
    def test_are_those_of_scikit_image(self, strength: float):
        original = pictures()
        image = disturbed(original, strength)
        found = compare(original, image)
        similarity, ratio = expected(original[0], image[0])
        assert found.ssim == pytest.approx(similarity, abs=SSIM_TOLERANCE)
        assert found.psnr == pytest.approx(ratio, abs=PSNR_TOLERANCE)

    def test_of_a_batch_are_means_over_its_pictures(self):
        original = pictures(3)
        image = torch.cat([disturbed(original[:1], 0.3), disturbed(original[1:], 0.01)])
        found = compare(original, image)
        similarities, ratios = zip(*map(expected, original, image), strict=True)
        assert max(ratios) - min(ratios) > 20
        assert found.ssim == pytest.approx(sum(similarities) / 3, abs=SSIM_TOLERANCE)
        assert found.psnr == pytest.approx(sum(ratios) / 3, abs=PSNR_TOLERANCE)

    def test_of_identical_pictures_are_finite(self):
        for original in (pictures(2), torch.zeros(1, 16, 16, 3)):
            found = compare(original, original.clone())
            assert found.ssim == pytest.approx(1, abs=1e-6)
            assert found.psnr == 100

    def test_of_a_broken_picture_are_no_numbers(self):
        image = pictures()
        image[0, 20, 20] = math.nan
        found = compare(pictures(), image)
        assert math.isnan(found.ssim)
        assert math.isnan(found.psnr)


class TestDifference:
    def test_is_amplified_around_grey(self):
        original, image = torch.full((1, 16, 16, 3), 0.5), torch.full((1, 16, 16, 3), 0.5)
        image[0, 3, 4, 0] += 0.0625
        image[0, 5, 6, 1] -= 0.0625
        image[0, 7, 8, 2] -= 0.5
        found = compare(original, image, amplify=4).difference
        wanted = torch.full_like(image, 0.5)
        wanted[0, 3, 4, 0], wanted[0, 5, 6, 1], wanted[0, 7, 8, 2] = 0.75, 0.25, 0.0
        assert found.equal(wanted)


class TestAlpha:
    def test_is_compared_as_it_looks_on_grey(self):
        colours, alpha = pictures(), pictures(channels=1, seed=3)
        clear = torch.cat([colours, alpha], -1)
        seen = colours * alpha + 0.5 * (1 - alpha)
        assert compare(clear, seen).psnr == 100
        assert compare(clear, colours).psnr == pytest.approx(
            expected(seen[0], colours[0])[1], abs=PSNR_TOLERANCE
        )

    def test_colours_that_nobody_sees_do_not_count(self):
        original, image = pictures(channels=4), pictures(channels=4, seed=1)
        original[..., 3] = image[..., 3] = 0
        assert compare(original, image).psnr == 100


class TestRefused:
    def test_other_sizes(self):
        message = "the original is 1 x 56 x 40 pixels of 3 channels, the image 1 x 40 x 56"
        with pytest.raises(ValueError, match=message):
            compare(pictures(), pictures().transpose(1, 2))

    def test_other_numbers(self):
        with pytest.raises(ValueError, match=r"original is 3 x .*, the image 2 x "):
            compare(pictures(3), pictures(2))

    def test_too_small_ones(self):
        small = pictures()[:, :10]
        with pytest.raises(ValueError, match=r"1 x 56 x 10 pixels .* needs at least 11 pixels"):
            compare(small, small)

    def test_none(self):
        with pytest.raises(ValueError, match="no pictures"):
            compare(pictures()[:0], pictures()[:0])
