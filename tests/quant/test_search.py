"""The search for amax, against one that tries every candidate on every bin."""

import itertools

import pytest
import reference
import torch
from helpers import DTYPES, IMPORTANCES, WEIGHTS, gaussian, importance_of, weight_of
from hswq.quant import SearchSettings, optimal_amax, weighted_histogram, weighted_mse
from hswq.quant.search import _evenly as evenly
from hswq.quant.search import candidate_errors, search_amax

SHAPES = [(1, 1), (8, 6), (5, 4, 3, 3), (30, 12), (7,)]
SETTINGS = [(64, 25, 3), (100, 8, 2), (256, 30, 0), (33, 3, 6)]
MIXED = [
    (kind, *rest)
    for kind, *rest in zip(
        [*WEIGHTS] * 8,
        itertools.cycle(DTYPES),
        itertools.cycle(IMPORTANCES),
        itertools.cycle(SHAPES),
        itertools.cycle(SETTINGS),
        strict=False,
    )
]


def assert_finds_what_the_reference_finds(
    weight, importance, device, *, scaled, bins, candidates, refinements
) -> None:
    listed = None if importance is None else importance.double().tolist()
    histogram = reference.histogram(weight, listed, bins)
    expected = reference.search(
        histogram, scaled=scaled, candidates=candidates, refinements=refinements
    )
    weight = weight.to(device)
    amax = optimal_amax(
        weight, importance,
        scaled=scaled, bins=bins, candidates=candidates, refinements=refinements,
    )  # fmt: skip
    assert amax == pytest.approx(expected.amax, rel=1e-6)
    # Errors so small that FP32 rounding makes them (1e-14 of the mean square) have fewer digits.
    floor = 1e-22 * (histogram.density @ histogram.centres**2)
    error = weighted_mse(weight, importance, amax, scaled=scaled, bins=bins)
    assert error == pytest.approx(expected.mse, rel=1e-9, abs=floor)


@pytest.mark.parametrize("scaled", [False, True], ids=["compatible", "scaled"])
class TestOptimalAmax:
    @pytest.mark.parametrize("case", range(len(MIXED)), ids=[case[0] for case in MIXED])
    def test_is_the_references(self, case, scaled, device):
        kind, dtype, importance, shape, (bins, candidates, refinements) = MIXED[case]
        assert_finds_what_the_reference_finds(
            weight_of(kind, shape, dtype, seed=case),
            importance_of(importance, shape[1] if len(shape) > 1 else 1, seed=case),
            device,
            scaled=scaled,
            bins=bins,
            candidates=candidates,
            refinements=refinements,
        )

    def test_first_of_equals_stays(self, scaled):
        """All weights below half the smallest FP8 number: V1 stores 0 whatever it clips at."""
        weight = torch.full((4, 4), 2.0**-12)
        amax = optimal_amax(weight, scaled=scaled)
        assert (amax == 2.0**-13) is not scaled

    def test_zeros(self, scaled, device):
        assert 0 < optimal_amax(torch.zeros(8, 8, device=device), scaled=scaled) <= 1.2e-7

    def test_is_in_its_range(self, scaled, device):
        for kind in WEIGHTS:
            weight = weight_of(kind, (20, 20)).to(device)
            largest = max(weight.abs().max().item(), 1e-7)
            amax = optimal_amax(weight, scaled=scaled, bins=256, candidates=20)
            assert 0.1 * largest <= amax <= 1.2 * largest * (1 + 1e-6)

    def test_infinite_weights_do_not_break_it(self, scaled, device):
        weight = gaussian(20, 20)
        expected = optimal_amax(weight.index_fill(0, torch.tensor([3]), 0), scaled=scaled)
        weight[3] = torch.inf
        assert optimal_amax(weight.to(device), scaled=scaled) == expected
        weight[3] = torch.nan
        assert optimal_amax(weight.to(device), scaled=scaled) == expected

    def test_huge_weights(self, scaled):
        weight = torch.tensor([[1.0, -2e38, 3.4e38]])
        assert 0 < optimal_amax(weight, scaled=scaled) < float("inf")

    def test_does_not_change_its_input(self, scaled):
        weight, importance = gaussian(8, 8), importance_of("random", 8)
        copies = weight.clone(), importance.clone()
        optimal_amax(weight, importance, scaled=scaled, bins=64)
        assert torch.equal(weight, copies[0])
        assert torch.equal(importance, copies[1])

    @pytest.mark.parametrize(
        "wrong",
        [
            {"bins": 1},
            {"bins": 65537},
            {"bins": 4096.0},
            {"candidates": 1},
            {"candidates": True},
            {"refinements": -1},
            {"refinements": "3"},
        ],
    )
    def test_settings_out_of_range(self, wrong, scaled):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} must be a whole number from"):
            optimal_amax(gaussian(4, 4), scaled=scaled, **wrong)


class TestDefaults:
    def test_find_what_the_reference_finds(self, device):
        weight, importance = weight_of("heavy tails", (30, 20)), importance_of("spiky", 20)
        assert_finds_what_the_reference_finds(
            weight, importance, device, scaled=True, bins=4096, candidates=200, refinements=3
        )


class TestWhatItIsWorth:
    """HSWQ.md, "What is known about it": measured on the original's own code."""

    def gain(self, weight, *, scaled: bool) -> float:
        plain = weighted_mse(weight, None, 448.0, scaled=False)
        amax = optimal_amax(weight, scaled=scaled)
        return 1 - weighted_mse(weight, None, amax, scaled=scaled) / plain

    def test_compatible_hardly_changes_anything_below_448(self):
        assert 0 <= self.gain(gaussian(256, 256), scaled=False) < 0.01

    def test_scaled_has_a_third_less_error_on_gaussian_weights(self):
        assert self.gain(gaussian(256, 256), scaled=True) == pytest.approx(0.36, abs=0.02)


class TestSearchAmax:
    @pytest.mark.parametrize("scaled", [False, True])
    def test_returns_the_amax_and_its_error(self, scaled, device):
        weight = gaussian(20, 20).to(device)
        histogram = weighted_histogram(weight, None, 512)
        amax, error, _ = search_amax(histogram, SearchSettings(512, 50, 2), scaled=scaled)
        assert (amax.dtype, error.dtype) == (torch.float32, torch.float64)
        assert (amax.shape, amax.device, error.device) == ((), weight.device, weight.device)
        expected = weighted_mse(weight, None, amax.item(), scaled=scaled, bins=512)
        assert error.item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_many_rounds_end_where_every_candidate_on_every_bin_ends(self, kind, scaled, device):
        """So fine a search that many candidates are one number, or an ulp apart."""
        histogram = weighted_histogram(weight_of(kind, (20, 20)).to(device), None, 64)
        amax, error, _ = search_amax(histogram, SearchSettings(64, 200, 12), scaled=scaled)
        expected = self.every_candidate(histogram, 200, 12, scaled)
        assert amax.item() == pytest.approx(expected[0], rel=1e-6)
        assert error.item() == pytest.approx(expected[1], rel=1e-9)

    def every_candidate(self, histogram, count, refinements, scaled) -> tuple[float, float]:
        largest = histogram.maximum.item()
        low, high, best, lowest = largest / 2, largest, largest, float("inf")
        for _ in range(refinements + 1):
            candidates = torch.linspace(low, high, count).to(histogram.maximum.device)
            error, index = candidate_errors(histogram, candidates, scaled=scaled).min(0)
            if error.item() < lowest:
                best, lowest = candidates[index].item(), error.item()
            reach = (high - low) / 4
            low, high = max(0.1 * largest, best - reach), min(1.2 * largest, best + reach)
        return best, lowest


class TestEvenly:
    @pytest.mark.parametrize("count", [2, 3, 8, 25, 200, 1000])
    def test_is_linspace_to_the_bit(self, count):
        ends = torch.rand(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for low, spread in ends.tolist():
            for high in (low + spread, low + spread * 1e-3, low * (1 + 1e-6), low):
                expected = torch.linspace(low, high, count)
                found = evenly(
                    torch.tensor(low, dtype=torch.float64),
                    torch.tensor(high, dtype=torch.float64),
                    count,
                )
                assert torch.equal(found, expected)
