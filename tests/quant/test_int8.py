"""INT8 with a scale a row, against an oracle in float64 that shares no code with it."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    IMPORTANCES,
    WEIGHTS,
    gaussian,
    importance_of,
    inputs_of,
    sketch_of,
    weight_of,
)
from hswq.quant import (
    INT8,
    INT8_MAX,
    BySensitivity,
    Clipping,
    KnownPlan,
    Planner,
    SearchSettings,
    bytes_of,
    compensate,
    dequantize,
    int8,
    output_error,
    quantize_compensated,
)
from hswq.quant.findings import Findings

SHAPES = [(7, 33), (5, 16, 3, 3), (3, 1, 1, 1)]


def oracle_errors(row: np.ndarray, importance: np.ndarray, share: int) -> float:
    """The weighted squared error of a row that is clipped at so many parts of its largest."""
    largest = np.abs(row).max()
    amax = (largest if largest > 1e-30 else 1e-7) * share / 128
    steps = np.clip(np.rint(row * 127 / amax), -127, 127)
    return float((importance * (steps * amax / 127 - row) ** 2).sum())


def oracle_search(row: np.ndarray, importance: np.ndarray) -> tuple[int, float]:
    """The best share, tried coarsely and then ever more finely, and its error."""
    best, lowest = 128, oracle_errors(row, importance, 128)
    for step in (32, 16, 8, 4, 2, 1):
        for share in (96, 64, 32) if step == 32 else (min(128, best + step), best - step):
            error = oracle_errors(row, importance, share)
            if error < lowest:
                best, lowest = share, error
    return best, lowest


def in_float64(weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[np.ndarray, ...]:
    """Return rows (out, n) and the importance (n,) of each of their weights."""
    fitted = np.ones(weight.shape[1])
    if importance is not None and importance.any():
        known = min(len(fitted), len(importance))
        fitted[:known] = importance[:known].double().numpy()
    rows = weight.cpu().double().numpy().reshape(len(weight), -1)
    return rows, np.repeat(fitted, rows.shape[1] // len(fitted))


class TestSearch:
    @pytest.mark.parametrize("kind", WEIGHTS)
    @pytest.mark.parametrize("importance", IMPORTANCES)
    def test_finds_what_the_oracle_finds(self, kind, importance, device):
        for shape in SHAPES:
            weight, shares = weight_of(kind, shape), importance_of(importance, shape[1])
            found = INT8.search(weight.to(device), shares, SearchSettings())
            rows, per_weight = in_float64(weight, shares)
            amax, chosen, _ = found.clipping
            scale = np.array([max(np.abs(row).max(), 1e-7) for row in rows])
            expected = max(scale / 128 * chosen.cpu().double().numpy())
            assert amax.item() == pytest.approx(expected, rel=1e-6)
            for row, share in zip(rows, chosen.tolist(), strict=True):
                ours, power = oracle_errors(row, per_weight, share), (per_weight * row**2).sum()
                # FP32 sums tell errors apart that differ by more than this.
                assert ours <= oracle_search(row, per_weight)[1] * 1.0001 + 1e-12 * power
            errors = [
                oracle_errors(*one)
                for one in zip(rows, [per_weight] * len(rows), chosen.tolist(), strict=True)
            ]
            power = (per_weight * rows**2).sum()
            assert found.error.item() == pytest.approx(sum(errors), rel=1e-3, abs=1e-10 * power)
            assert found.finite

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_clips_an_outlier_in_a_channel_that_hardly_counts(self, dtype, device):
        weight = gaussian(6, 4000)
        weight[2, 5] = 1.0
        importance = torch.ones(4000)
        importance[5] = 1e-4
        found = INT8.search(weight.to(device, dtype), importance, SearchSettings())
        shares = found.clipping.row_shares.tolist()
        assert shares[2] < 40 < min(shares[:2] + shares[3:])

    def test_what_is_not_finite_counts_as_zero(self, device):
        weight = gaussian(4, 20).to(device)
        weight[1, :2] = torch.tensor([math.inf, math.nan])
        found = int8.search_rows(weight, None)
        weight[1, :2] = 0
        expected = int8.search_rows(weight, None)
        assert not found.finite
        assert expected.finite
        assert torch.equal(found.shares, expected.shares)
        assert found.largest.equal(expected.largest)


class TestQuantize:
    @pytest.mark.parametrize("kind", WEIGHTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_stores_what_the_oracle_stores(self, kind, dtype, device):
        for shape in SHAPES:
            weight = weight_of(kind, shape, dtype)
            clipping = INT8.search(weight.to(device), None, SearchSettings()).clipping
            stored, scale = INT8.quantize(weight.to(device), clipping)
            assert (stored.dtype, stored.shape) == (torch.int8, weight.shape)
            assert (scale.dtype, tuple(scale.shape)) == (torch.float32, INT8.scale_shape(shape))
            rows, _ = in_float64(weight, None)
            for row, found, share, one in zip(
                rows, stored.flatten(1).tolist(), clipping.row_shares.tolist(), scale, strict=True
            ):
                amax = max(np.abs(row).max(), 1e-7 if not row.any() else 0) * share / 128
                assert one.item() == pytest.approx(amax / 127, rel=1e-6)
                exact = np.clip(row * 127 / amax, -127, 127)
                assert np.abs(np.array(found) - exact).max() <= 0.5 + 1e-4

    def test_a_known_clipping_gives_the_same(self, device):
        """An amax that came from a search and through a file moves no row."""
        weight = weight_of("heavy tails", (64, 80)).to(device)
        amax, shares, _ = INT8.search(weight, None, SearchSettings()).clipping
        known = Clipping(amax.item(), bytes(shares.tolist()))
        for one, other in zip(
            INT8.quantize(weight, (amax, shares)), INT8.quantize(weight, known), strict=True
        ):
            assert torch.equal(one, other)

    def test_another_amax_moves_all_rows_alike(self):
        weight = gaussian(6, 50)
        amax, shares, _ = INT8.search(weight, None, SearchSettings()).clipping
        _, before = INT8.quantize(weight, Clipping(amax, shares))
        _, after = INT8.quantize(weight, Clipping(1.02 * amax, shares))
        torch.testing.assert_close(after, 1.02 * before)

    def test_not_finite_weights(self, device):
        weight = torch.tensor([[math.inf, -math.inf, math.nan, 0.5, -1.0]]).to(device)
        stored, scale = int8.quantize(weight, 1.0)
        assert stored.tolist() == [[127, -127, 0, 64, -127]]
        assert scale.item() == pytest.approx(1 / 127)

    def test_shares_of_another_layer(self):
        with pytest.raises(ValueError, match="of 3 rows cannot clip one of 4"):
            int8.quantize(gaussian(4, 4), 1.0, b"\x80\x80\x80")


class TestDequantize:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(6, 48), (5, 33), (4, 16, 3, 3), (3, 5, 3, 3), (1, 1)])
    def test_is_the_product(self, dtype, shape, device):
        numbers = torch.randint(-127, 128, shape).to(torch.int8)
        scale = gaussian(shape[0], 1).abs() + 1e-6
        expected = numbers.double() * scale.double().reshape(-1, *[1] * (len(shape) - 1))
        found = dequantize(numbers.to(device), scale.to(device), dtype)
        assert (found.dtype, found.shape) == (dtype, numbers.shape)
        assert torch.equal(found.cpu(), expected.float().to(dtype))

    def test_channels_last(self, device):
        numbers = torch.randint(-127, 128, (6, 16, 3, 3)).to(torch.int8)
        scale = gaussian(6, 1).abs()
        expected = dequantize(numbers, scale, torch.float16)
        last = numbers.to(device, memory_format=torch.channels_last)
        assert torch.equal(dequantize(last, scale.to(device), torch.float16).cpu(), expected)


class TestCompensated:
    @pytest.mark.parametrize("shape", [(40, 96), (24, 70, 3, 3), (5, 33, 1, 1), (3, 1)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_lowers_the_outputs_error(self, shape, dtype, device):
        weight = gaussian(*shape).to(device, dtype)
        sketch = sketch_of(inputs_of(shape[1])).to(device)
        clipping = INT8.search(weight, None, SearchSettings()).clipping
        nearest, found = INT8.quantize(weight, clipping), INT8.quantize(weight, clipping, sketch)
        assert torch.equal(found[1], nearest[1])
        errors = [output_error(weight, *one, sketch) for one in (nearest, found)]
        if shape[1] == 1:
            assert errors[0] == errors[1]
        else:
            assert errors[1] < 0.9 * errors[0] < 0.01

    def test_is_far_below_fp8(self):
        weight, sketch = gaussian(64, 200), sketch_of(inputs_of(200))
        clipping = INT8.search(weight, None, SearchSettings()).clipping
        fp8 = quantize_compensated(weight, 0.08, sketch, scaled=True)
        ours = INT8.quantize(weight, clipping, sketch)
        assert output_error(weight, *ours, sketch) < 0.5 * output_error(weight, *fp8, sketch)

    def test_without_a_usable_sketch_it_is_to_the_nearest(self):
        weight = gaussian(8, 12)
        assert compensate.usable_rows(weight, torch.zeros(128, 12)) is None
        clipping = INT8.search(weight, None, SearchSettings()).clipping
        found = INT8.quantize(weight, clipping, torch.zeros(128, 12))
        assert torch.equal(found[0], INT8.quantize(weight, clipping)[0])


class TestPlan:
    @pytest.fixture
    def plan(self):
        planner = Planner(None, BySensitivity(0), INT8)
        for seed in range(3):
            planner.clipping_of(f"layer{seed}", weight_of("heavy tails", (4 + seed, 30), seed=seed))
        return planner.finish()

    def test_has_where_each_row_is_clipped(self, plan):
        assert [len(layer.row_shares) for layer in plan.layers.values()] == [4, 5, 6]
        assert all(0 < layer.relative_error < 0.2 for layer in plan.layers.values())

    def test_repeated_it_gives_the_same_bytes(self, plan):
        for seed, name in enumerate(plan.layers):
            weight = weight_of("heavy tails", (4 + seed, 30), seed=seed)
            searched = INT8.search(weight, None, SearchSettings()).clipping
            expected = INT8.quantize(weight, searched)
            found = INT8.quantize(weight, KnownPlan(plan).clipping_of(name))
            assert all(map(torch.equal, found, expected))

    def test_is_kept_and_read_again(self, plan):
        found = Findings.of(plan, 5)
        assert Findings.from_json(found.to_json()) == found
        planner = Planner(None, BySensitivity(0), INT8, known=found)
        assert planner.known_plan().layers["layer1"].row_shares == plan.layers["layer1"].row_shares

    def test_counts_its_scales(self):
        assert bytes_of(INT8, (10, 20, 3, 3)) == 1800 + 40
        assert INT8_MAX == 127
