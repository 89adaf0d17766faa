"""What happens to every layer, and why."""

import dataclasses
import math

import pytest
import reference
import torch
from helpers import gaussian, importance_of, make_planner
from hswq.quant import (
    FP8_PLAIN,
    FP8_SCALED,
    BySensitivity,
    LayerPlan,
    Plan,
    Planner,
    Reason,
    SearchSettings,
    decider_of,
    dequantize,
    make_plan,
    optimal_amax,
    quantize,
)
from hswq.quant.plan import (
    expected_error,
)

QUICK = SearchSettings(bins=64, candidates=10, refinements=1)


@dataclasses.dataclass
class Measured:
    """One layer's statistics, as a Plan reads them."""

    sensitivity: float
    importance: torch.Tensor | None = None


def sensitivities(*values: float) -> dict[str, Measured]:
    return {f"layer{index}": Measured(value) for index, value in enumerate(values)}


def weights(count: int, *shape: int) -> dict[str, torch.Tensor]:
    shape = shape or (6, 4)
    return {f"layer{index}": gaussian(*shape, seed=index) for index in range(count)}


def plan_of(statistics, count: int, keep_ratio: float = 0.25, *, scaled: bool = True) -> Plan:
    return make_plan(weights(count), statistics, keep_ratio, scaled, QUICK)


def kept_of(statistics, keep_ratio: float) -> set[str]:
    reasons = BySensitivity(keep_ratio).choose(statistics)
    return {name for name, reason in reasons.items() if reason is Reason.KEPT_SENSITIVE}


class TestBySensitivity:
    def test_the_most_sensitive_stay(self):
        assert kept_of(sensitivities(1, 5, 3, 4), 0.5) == {"layer1", "layer3"}

    @pytest.mark.parametrize(
        ("count", "keep_ratio", "kept"),
        [
            (10, 0.0, 0),
            (10, 0.09, 0),
            (10, 0.1, 1),
            (10, 0.25, 2),
            (10, 0.3, 3),
            (3, 0.33, 0),
            (100, 0.29, 28),  # 100 * 0.29 is 28.999999999999996, and int() cuts
            (794, 0.25, 198),
            (7, 1.0, 7),
            (7, 1, 7),
            (0, 0.5, 0),
        ],
    )
    def test_how_many_stay(self, count, keep_ratio, kept):
        assert len(kept_of(sensitivities(*range(count)), keep_ratio)) == kept

    def test_equal_ones_in_order(self):
        statistics = {name: Measured(1.0) for name in "dacb"}
        assert kept_of(statistics, 0.25) == {"d"}
        assert kept_of(statistics, 0.5) == {"d", "a"}
        assert kept_of({"z": Measured(2.0), **statistics}, 0.4) == {"z", "d"}

    def test_what_is_not_finite_is_not_counted(self):
        statistics = sensitivities(1, math.nan, 3, math.inf, 2)
        assert kept_of(statistics, 0.34) == {"layer2"}
        statistics["layer2"].importance = torch.tensor([1.0, math.nan])
        assert kept_of(statistics, 0.5) == {"layer4"}

    def test_named_layers_stay_beside_them(self):
        selection = BySensitivity(0.25, frozenset({"layer0", "other"}))
        assert selection.choose(sensitivities(1, 5, 3, 4)) == {
            "layer0": Reason.KEPT_BY_NAME,
            "layer1": Reason.KEPT_SENSITIVE,
            "layer2": Reason.QUANTIZED,
            "layer3": Reason.QUANTIZED,
        }
        unmeasured = Planner(None, selection)
        assert unmeasured.reason("other") is Reason.KEPT_BY_NAME
        assert unmeasured.reason("layer1") is Reason.QUANTIZED_UNIFORM


class TestMakePlan:
    def test_keeps_and_quantizes(self):
        plan = plan_of(sensitivities(1, 9, 2, 3), 4)
        assert plan.kept == ["layer1"]
        assert plan.quantized == ["layer0", "layer2", "layer3"]
        assert list(plan.layers) == ["layer0", "layer1", "layer2", "layer3"]
        assert plan.layers["layer1"] == LayerPlan("layer1", None, Reason.KEPT_SENSITIVE, 9)
        assert {plan.layers[name].reason for name in plan.quantized} == {Reason.QUANTIZED}
        assert [layer.sensitivity for layer in plan.layers.values()] == [1, 9, 2, 3]
        assert (plan.number_format, plan.settings) == (FP8_SCALED, QUICK)
        assert plan.selection == BySensitivity(0.25)
        assert plan.warnings == ()

    @pytest.mark.parametrize("scaled", [False, True])
    def test_amax_is_the_searchs(self, scaled, device):
        importance = importance_of("spiky", 4)
        layers = {name: weight.to(device) for name, weight in weights(2).items()}
        plan = make_plan(layers, {"layer0": Measured(1, importance)}, 0, scaled)
        expected = optimal_amax(layers["layer0"], importance, scaled=scaled)
        assert plan.layers["layer0"].amax == expected
        scale = plan.number_format.scale_of(plan.layers["layer0"].amax)
        assert scale == (expected / 448 if scaled else 1)

    @pytest.mark.parametrize("scaled", [False, True])
    def test_relative_error(self, scaled, device):
        weight, importance = gaussian(64, 48), importance_of("random", 48)
        statistics = {"layer0": Measured(1, importance)}
        plan = make_plan({"layer0": weight.to(device)}, statistics, 0, scaled)
        layer = plan.layers["layer0"]
        histogram = reference.histogram(weight, importance.tolist(), 4096)
        power = float(histogram.density @ histogram.centres**2)
        expected = math.sqrt(reference.mse(histogram, layer.amax, scaled) / power)
        assert layer.relative_error == pytest.approx(expected, rel=1e-6)
        # And it tells the truth about the bytes.
        stored, scale = quantize(weight, layer.amax, scaled=scaled)
        error = (dequantize(stored, scale, torch.float64) - weight).square() @ importance.double()
        measured = (error.sum() / (weight.double().square() @ importance.double()).sum()).sqrt()
        assert layer.relative_error == pytest.approx(measured.item(), rel=0.01)

    def test_a_layer_without_statistics_is_kept_and_not_counted(self):
        plan = plan_of(sensitivities(1, 2, 3, 4), 8)
        assert plan.kept == ["layer3", "layer4", "layer5", "layer6", "layer7"]
        assert plan.layers["layer4"] == LayerPlan("layer4", None, Reason.KEPT_UNMEASURED, None)

    @pytest.mark.parametrize("sensitivity", [math.nan, math.inf, -math.inf])
    def test_a_layer_whose_sensitivity_is_not_finite_is_kept(self, sensitivity):
        plan = plan_of(sensitivities(1, sensitivity), 2, 0)
        assert plan.layers["layer1"] == LayerPlan("layer1", None, Reason.KEPT_NOT_FINITE, None)
        assert plan.quantized == ["layer0"]

    def test_a_layer_whose_importance_is_not_finite_is_kept(self):
        statistics = {"layer0": Measured(1, torch.tensor([1.0, math.inf, 1.0, 1.0]))}
        plan = make_plan(weights(1), statistics, 0, True, QUICK)
        assert plan.layers["layer0"].reason == Reason.KEPT_NOT_FINITE

    def test_without_statistics_everything_is_quantized(self):
        plan = plan_of(None, 3, 0.5)
        assert plan.quantized == ["layer0", "layer1", "layer2"]
        assert {layer.reason for layer in plan.layers.values()} == {Reason.QUANTIZED_UNIFORM}
        expected = optimal_amax(
            weights(1)["layer0"], scaled=True, bins=64, candidates=10, refinements=1
        )
        assert plan.layers["layer0"].amax == expected

    def test_empty_statistics_keep_everything(self):
        plan = plan_of({}, 2)
        assert plan.kept == ["layer0", "layer1"]

    def test_statistics_of_another_model(self):
        statistics = sensitivities(*range(6))
        message = "another model: 4 of their 6 layers are not in this one, the first is 'layer2'"
        with pytest.raises(ValueError, match=message):
            plan_of(statistics, 2)

    @pytest.mark.parametrize("channels", [3, 5])
    def test_another_number_of_channels_is_a_warning(self, channels):
        statistics = {"layer0": Measured(1, torch.ones(channels))}
        plan = make_plan(weights(1), statistics, 0, True, QUICK)
        (warning,) = plan.warnings
        assert f"layer0 has 4 input channels, but its statistics have {channels}" in warning
        assert plan.quantized == ["layer0"]

    @pytest.mark.parametrize(("shape", "channels"), [((6, 4), 1), ((6, 4), 4), ((6,), 1)])
    def test_channels_that_fit(self, shape, channels):
        statistics = {"layer0": Measured(1, torch.ones(channels))}
        plan = make_plan(weights(1, *shape), statistics, 0, True, QUICK)
        assert plan.warnings == ()

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_weights_that_are_not_finite_are_a_warning(self, value, device):
        layers = {name: weight.to(device) for name, weight in weights(2).items()}
        layers["layer1"][0, 0] = value
        plan = make_plan(layers, None, 0, True, QUICK)
        assert plan.warnings == ("layer1 has weights that are not finite; inf was clipped",)
        assert all(math.isfinite(layer.amax) for layer in plan.layers.values())

    @pytest.mark.parametrize("scaled", [False, True])
    def test_a_layer_of_zeros(self, scaled):
        plan = make_plan({"layer0": torch.zeros(6, 4)}, None, 0, scaled, QUICK)
        layer = plan.layers["layer0"]
        assert 0 < layer.amax <= 1.2e-7
        assert math.isfinite(layer.relative_error)

    def test_layers_may_be_produced_one_at_a_time(self):
        statistics = sensitivities(1, 2, 3)
        streamed = make_plan(iter(weights(3).items()), statistics, 0.4, True, QUICK)
        assert streamed == plan_of(statistics, 3, 0.4)

    @pytest.mark.parametrize(
        "keep_ratio", [math.nan, math.inf, -0.1, 1.0000001, True, "0.25", None, [0.5]]
    )
    def test_keep_ratio_out_of_range(self, keep_ratio):
        with pytest.raises(ValueError, match="keep_ratio must be a number from 0 to 1, got"):
            plan_of(sensitivities(1), 1, keep_ratio)

    def test_does_not_change_what_it_is_given(self):
        layers, statistics = weights(2), sensitivities(1, 2)
        make_plan(layers, statistics, 0, True, QUICK)
        assert all(torch.equal(weight, weights(2)[name]) for name, weight in layers.items())
        assert statistics == sensitivities(1, 2)


class TestPlanner:
    def test_returns_the_clipping_or_none(self, device):
        planner = make_planner(sensitivities(2, 1), 0.5, scaled=True, settings=QUICK)
        layers = {name: weight.to(device) for name, weight in weights(2).items()}
        assert planner.clipping_of("layer0", layers["layer0"]) is None
        amax = planner.clipping_of("layer1", layers["layer1"]).amax
        assert (amax.dtype, amax.shape, amax.device.type) == (torch.float32, (), device.type)
        assert planner.finish().layers["layer1"].amax == amax.item()

    def test_quantizes_knows_before_the_weight_is_there(self):
        statistics = sensitivities(1, 2, math.nan)
        planner = make_planner(statistics, 0.5, scaled=True, settings=QUICK)
        known = {name: planner.quantizes(name) for name in weights(4)}
        assert known == {"layer0": True, "layer1": False, "layer2": False, "layer3": False}
        for name, weight in weights(4).items():
            assert (planner.clipping_of(name, weight) is not None) == known[name]
        assert make_planner(None, 0.5, scaled=True).quantizes("anything")

    def test_finish_twice_gives_the_same(self):
        statistics = {"layer0": Measured(1, torch.ones(9))}
        planner = make_planner(statistics, 0, scaled=True, settings=QUICK)
        planner.clipping_of("layer0", torch.full((3, 4), math.inf))
        assert len(planner.finish().warnings) == 2
        assert planner.finish() == planner.finish()


class TestPlan:
    @pytest.fixture
    def plan(self) -> Plan:
        statistics = {**sensitivities(1, 2, math.nan), "layer3": Measured(0.5, torch.ones(9))}
        return plan_of(statistics, 5, 0.34)

    def test_is_frozen(self, plan):
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.number_format = FP8_PLAIN
        with pytest.raises(TypeError):
            plan.layers["layer0"] = None

    @pytest.mark.parametrize("scaled", [False, True])
    def test_applied_as_a_source_it_decides_as_its_planner_did(self, scaled):
        layers = weights(3)
        planner = make_planner(sensitivities(1, 2, 3), 0.34, scaled=scaled, settings=QUICK)
        decided = {name: planner.clipping_of(name, weight) for name, weight in layers.items()}
        plan = planner.finish()
        known = decider_of(plan)
        for name, weight in layers.items():
            clipping = known.clipping_of(name, weight)
            assert (clipping is None) == (decided[name] is None)
            if clipping is not None:
                one, _ = quantize(weight, clipping.amax, scaled=scaled)
                other, _ = quantize(weight, decided[name].amax, scaled=scaled)
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        assert known.finish() is plan

    def test_a_layer_that_it_does_not_know(self, plan):
        with pytest.raises(ValueError, match="another model: it has no layer 'other'"):
            decider_of(plan).clipping_of("other", gaussian(4, 4))

    def test_quantizes(self, plan):
        assert [name for name in plan.layers if decider_of(plan).quantizes(name)] == plan.quantized
        assert not decider_of(plan).quantizes("other")


class TestExpectedError:
    def test_is_the_root_of_the_mean_over_all_parameters(self):
        assert expected_error([(0.3, 100), (0.0, 300)]) == pytest.approx(0.15)
        assert expected_error([(0.02, 1), (0.02, 1000)]) == pytest.approx(0.02)

    def test_of_nothing_is_none(self):
        assert expected_error([]) == 0

    def test_is_that_of_the_weights_themselves(self):
        """Of layers of one size and variance, the error over all of them."""
        layers = weights(4, 64, 48)
        plan = make_plan(layers, None, 0, True)
        errors = [
            dequantize(*quantize(layers[name], layer.amax, scaled=True), torch.float64)
            - layers[name]
            for name, layer in plan.layers.items()
        ]
        norms = [sum(x.double().square().sum() for x in xs) for xs in (errors, layers.values())]
        pairs = [(layer.relative_error, 64 * 48) for layer in plan.layers.values()]
        assert expected_error(pairs) == pytest.approx((norms[0] / norms[1]).sqrt().item(), rel=0.02)
