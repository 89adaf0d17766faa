"""Statistics are sums, and sums add up."""

import dataclasses
import math

import pytest
import torch
from helpers import assert_same_layers, layer_statistics, statistics_of
from hswq.calibration import DualMonitor, LayerStatistics, Statistics


def layer(mean: float, square: float, calls: int, *importance: float) -> LayerStatistics:
    sums = torch.tensor(importance or (1.0,), dtype=torch.float64)
    return LayerStatistics(mean, square, calls, sums, calls)


class TestLayerStatistics:
    def test_sensitivity_is_the_variance(self):
        # Outputs of mean 1 and 3, of mean square 2 and 12: 14/2 - (4/2)^2
        assert layer(4.0, 14.0, 2).sensitivity == 3

    def test_sensitivity_is_never_below_zero(self):
        assert layer(3.0, 9.0 - 1e-12, 1).sensitivity == 0

    @pytest.mark.parametrize(
        ("mean", "square"),
        [(math.nan, 1), (1, math.nan), (math.inf, math.inf), (1, math.inf), (1e300, 1)],
    )
    def test_sensitivity_of_what_is_not_finite_is_nan(self, mean, square):
        assert math.isnan(layer(mean, square, 1).sensitivity)

    def test_importance_is_the_mean(self):
        assert layer(0, 0, 4, 2.0, 6.0).importance.tolist() == [0.5, 1.5]

    def test_the_two_counts_are_separate(self):
        measured = LayerStatistics(4.0, 14.0, 2, torch.tensor([6.0]), 3)
        assert (measured.sensitivity, measured.importance.item(), measured.calls) == (3, 2, 2)
        total = measured.merge(measured)
        assert (total.output_calls, total.input_calls) == (4, 6)

    @pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
    def test_finite(self, broken):
        assert layer(1, 2, 1, 3.0).finite
        assert not layer(broken, 2, 1, 3.0).finite
        assert not layer(1, broken, 1, 3.0).finite
        assert not layer(1, 2, 1, 3.0, broken).finite

    def test_merge_changes_neither(self):
        one, other = layer(1, 2, 1, 3.0), layer(4, 5, 2, 6.0)
        total = one.merge(other)
        assert (total.output_sum, total.output_square_sum, total.calls) == (5, 7, 3)
        assert total.importance_sum.tolist() == [9]
        assert (one.importance_sum.item(), other.importance_sum.item()) == (3, 6)

    def test_merge_of_other_channels(self):
        message = "statistics of 2 input channels to statistics of 1"
        with pytest.raises(ValueError, match=message):
            layer(1, 2, 1, 3.0).merge(layer(1, 2, 1, 3.0, 4.0))


class TestStatistics:
    def test_is_a_mapping_in_order(self):
        statistics = statistics_of("b", "a", "c")
        assert list(statistics) == ["b", "a", "c"]
        assert len(statistics) == 3
        assert "a" in statistics
        assert statistics.get("d") is None
        with pytest.raises(KeyError):
            statistics["d"]

    def test_is_not_changed_by_what_it_was_made_of(self):
        layers, meta = {"a": layer_statistics()}, {"samples": 1}
        statistics = Statistics(layers, meta)
        layers.clear()
        meta.clear()
        assert (list(statistics), statistics.samples) == (["a"], 1)
        with pytest.raises(TypeError):
            statistics.meta["samples"] = 2

    def test_empty(self):
        empty = Statistics()
        assert (len(empty), empty.samples, empty.fingerprint) == (0, 0, None)
        assert_same_layers(empty.merge(statistics_of("a")), statistics_of("a"))
        assert_same_layers(statistics_of("a").merge(empty), statistics_of("a"))


class TestMerge:
    def test_is_the_statistics_of_all_the_calls(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
        runs = [torch.randn(5, 6) for _ in range(6)]
        parts = []
        for start in range(0, 6, 2):
            with DualMonitor(model) as monitor:
                for values in runs[start : start + 2]:
                    model(values)
            parts.append(monitor.statistics())
        with DualMonitor(model) as monitor:
            for values in runs:
                model(values)
        merged = parts[0].merge(parts[1]).merge(parts[2])
        assert_same_layers(merged, monitor.statistics(), rel=1e-14)
        assert merged.meta["total_steps"] == 6

    @pytest.mark.parametrize(
        ("one", "other", "both"),
        [
            (2.0, 3.0, 3.0),
            (None, 3.0, 3.0),
            (0.0, None, 0.0),
            (None, None, None),
            (math.nan, 3.0, math.nan),
            (math.inf, 3.0, math.inf),
        ],
    )
    def test_takes_the_largest_input_that_is_known(self, one, other, both):
        layers = [dataclasses.replace(layer_statistics(), input_amax=a) for a in (one, other)]
        for first, second in (layers, layers[::-1]):
            assert str(first.merge(second).input_amax) == str(both)

    def test_is_associative(self):
        parts = [
            statistics_of("a", "b", seed=1, samples=1, total_steps=20, model="x"),
            statistics_of("b", "c", seed=2, samples=2, session="mine"),
            statistics_of("a", "b", "c", seed=3, samples=4, total_steps=5, model="y"),
        ]
        # Layers of one name have as many channels in all three.
        parts = [
            Statistics(
                {name: layer_statistics(seed=seed * 10 + ord(name)) for name in part}, part.meta
            )
            for seed, part in enumerate(parts)
        ]
        one = parts[0].merge(parts[1]).merge(parts[2])
        other = parts[0].merge(parts[1].merge(parts[2]))
        assert_same_layers(one, other, rel=1e-15)
        assert dict(one.meta) == dict(other.meta)
        assert dict(one.meta) == {
            "samples": 7, "total_steps": 25, "model": "x", "session": "mine",
        }  # fmt: skip

    def test_changes_neither(self):
        one, other = statistics_of("a", samples=1), statistics_of("a", seed=2, samples=2)
        before = one["a"].importance_sum.clone()
        one.merge(other)
        assert torch.equal(one["a"].importance_sum, before)
        assert (one.samples, other.samples) == (1, 2)

    def test_of_another_model(self):
        one, other = statistics_of("a", fingerprint="1234"), statistics_of("a", fingerprint="5678")
        with pytest.raises(ValueError, match="of the model 5678 to statistics of the model 1234"):
            one.merge(other)

    @pytest.mark.parametrize("unknown", [{}, {"fingerprint": None}])
    def test_of_an_unknown_model_with_a_known_one_is_of_the_known_one(self, unknown):
        known, other = statistics_of("a", fingerprint="1234"), statistics_of("a", **unknown)
        assert known.merge(other).fingerprint == "1234"
        assert other.merge(known).fingerprint == "1234"
        with pytest.raises(ValueError, match="5678"):
            other.merge(known).merge(statistics_of("a", fingerprint="5678"))

    def test_of_other_channels_names_the_layer(self):
        one = Statistics({"mid.0": layer_statistics(channels=3)})
        other = Statistics({"mid.0": layer_statistics(channels=4)})
        message = "layer 'mid.0': cannot add statistics of 4 input channels to statistics of 3"
        with pytest.raises(ValueError, match=message):
            one.merge(other)
