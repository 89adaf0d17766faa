"""The importance-weighted histogram, against one that counts weight by weight."""

import math

import numpy as np
import pytest
import reference
import torch
from helpers import DTYPES, IMPORTANCES, WEIGHTS, gaussian, importance_of, weight_of
from hswq.quant import histogram, weighted_histogram
from hswq.quant.histogram import ALL_ZERO_AMAX, fit_importance


def as_list(importance: torch.Tensor | None) -> list[float] | None:
    return None if importance is None else importance.double().tolist()


def assert_is_the_reference(weight, importance, bins, device) -> None:
    found = weighted_histogram(weight.to(device), importance, bins)
    expected = reference.histogram(weight, as_list(importance), bins)
    assert found.maximum.item() == expected.maximum
    assert found.maximum.dtype == torch.float32
    assert found.density.dtype == torch.float64
    np.testing.assert_allclose(found.density.cpu(), expected.density, rtol=1e-12, atol=0)
    np.testing.assert_allclose(found.centres().cpu(), expected.centres, rtol=1e-14)


class TestWeightedHistogram:
    @pytest.mark.parametrize("kind", WEIGHTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_weights(self, kind, dtype, device):
        weight = weight_of(kind, (24, 10), dtype)
        assert_is_the_reference(weight, importance_of("random", 10), 64, device)

    @pytest.mark.parametrize("shape", [(48, 10), (12, 10, 2, 2), (480,)])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_in_pieces_it_is_the_same(self, shape, weighted, monkeypatch):
        weight = gaussian(*shape)
        importance = importance_of("random", 10) if weighted else None
        whole = weighted_histogram(weight, importance, 64)
        monkeypatch.setattr(histogram, "_PIECE", 50)
        assert all(map(torch.equal, weighted_histogram(weight, importance, 64), whole))

    @pytest.mark.parametrize("kind", IMPORTANCES)
    def test_importances(self, kind, device):
        assert_is_the_reference(gaussian(24, 10), importance_of(kind, 10), 64, device)

    @pytest.mark.parametrize(
        "shape", [(1, 1), (7,), (1, 9), (9, 1), (6, 5, 3), (6, 5, 3, 3), (4, 6, 1, 1)]
    )
    @pytest.mark.parametrize("kind", ["none", "random", "short", "long"])
    def test_shapes(self, shape, kind, device):
        channels = shape[1] if len(shape) > 1 else 1
        assert_is_the_reference(gaussian(*shape), importance_of(kind, channels), 32, device)

    @pytest.mark.parametrize("bins", [2, 3, 100, 1000, 4096])
    def test_bins(self, bins, device):
        assert_is_the_reference(gaussian(40, 30), importance_of("random", 30), bins, device)

    @pytest.mark.parametrize("kind", ["none", "random"])
    def test_layouts(self, kind, device):
        weight, importance = gaussian(6, 5, 3, 3), importance_of(kind, 5)
        transposed = weight.transpose(0, 1).contiguous().transpose(0, 1)
        for other in (weight.to(memory_format=torch.channels_last), transposed):
            assert_is_the_reference(other, importance, 32, device)

    def test_a_parameter(self):
        weight = torch.nn.Parameter(gaussian(6, 5))
        found = weighted_histogram(weight, importance_of("random", 5), 32)
        assert not found.density.requires_grad
        assert not found.maximum.requires_grad

    def test_adds_up_to_one(self, device):
        density = weighted_histogram(gaussian(50, 50).to(device), None, 128).density
        assert density.sum().item() == pytest.approx(1, abs=1e-14)

    def test_every_weight_in_the_last_bin(self, device):
        found = weighted_histogram(torch.full((5, 4), -0.3, device=device), None, 16)
        assert found.density.tolist() == [0.0] * 15 + [1.0]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zeros(self, dtype, device):
        found = weighted_histogram(torch.zeros(5, 4, dtype=dtype, device=device), None, 16)
        assert found.maximum.item() == np.float32(ALL_ZERO_AMAX)
        assert found.density.tolist() == [1.0] + [0.0] * 15

    @pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-31])
    def test_weights_too_small_to_scale_count_as_zeros(self, magnitude, device):
        weight = torch.tensor([[0.0, magnitude, -magnitude]], device=device)
        found = weighted_histogram(weight, None, 4096)
        assert found.maximum.item() == np.float32(ALL_ZERO_AMAX)
        assert found.density[0] == 1

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["none", "random"])
    def test_weights_that_are_not_finite_count_as_zeros(self, kind, dtype, device):
        weight = gaussian(6, 5).to(dtype)
        weight[0, 0], weight[1, 2], weight[5, 4] = math.inf, -math.inf, math.nan
        zeroed = weight.nan_to_num(0, 0, 0)
        before = weight.clone()
        importance = importance_of(kind, 5)
        found = weighted_histogram(weight.to(device), importance, 32)
        expected = reference.histogram(zeroed, as_list(importance), 32)
        assert found.maximum.item() == expected.maximum
        np.testing.assert_allclose(found.density.cpu(), expected.density, rtol=1e-12)
        assert torch.equal(weight.nan_to_num(9), before.nan_to_num(9))


class TestFitImportance:
    def test_none_is_none(self):
        assert fit_importance(None, 4) is None

    def test_short_is_padded_with_one(self):
        assert fit_importance(torch.tensor([2.0, 3.0]), 4).tolist() == [2, 3, 1, 1]

    def test_long_is_cut(self):
        assert fit_importance(torch.tensor([2.0, 3.0, 4.0]), 2).tolist() == [2, 3]

    def test_any_dtype_becomes_float64(self):
        for dtype in (*DTYPES, torch.float64):
            assert fit_importance(torch.ones(3, dtype=dtype), 3).dtype == torch.float64

    def test_zeros_everywhere_are_none(self):
        assert fit_importance(torch.zeros(4), 4) is None

    def test_zeros_on_all_channels_that_there_are_count_as_none(self):
        assert fit_importance(torch.tensor([0.0, 0.0, 5.0]), 2) is None

    def test_zeros_on_some_stay(self):
        assert fit_importance(torch.tensor([0.0, 2.0]), 2).tolist() == [0, 2]
