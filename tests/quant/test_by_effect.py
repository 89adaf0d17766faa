"""Keeping layers by effect: a budget of bytes, spent on what changes most for its size."""

import math

import pytest
import torch
from hswq.calibration import LayerStatistics
from hswq.quant import ByEffect, Planner, Reason

COSTS = {"small": 10, "large": 1000, "middle": 100, "unmeasured": 10}
EFFECTS = {"small": 1.0, "large": 50.0, "middle": 20.0}


def statistics(*names: str, output: float = 1.0) -> dict[str, LayerStatistics]:
    return {name: LayerStatistics(0.0, output, 1, torch.ones(2), 1) for name in names}


def kept(budget: int, effects=EFFECTS, also_keep: frozenset = frozenset()) -> set[str]:
    chosen = ByEffect(budget, effects, COSTS, also_keep).choose(statistics(*EFFECTS))
    return {name for name, reason in chosen.items() if reason is not Reason.QUANTIZED}


class TestBudget:
    def test_goes_by_effect_a_byte(self):
        # A byte: middle 0.2, small 0.1, large 0.05.
        assert kept(0) == set()
        assert kept(100) == {"middle"}
        assert kept(110) == {"middle", "small"}
        assert kept(1110) == {"middle", "small", "large"}

    def test_what_does_not_fit_makes_way_for_what_does(self):
        assert kept(99) == {"small"}
        assert kept(1050) == {"middle", "small"}

    def test_a_layer_without_effect_is_not_kept(self):
        assert kept(10**6, {"small": 0.0, "middle": 1.0}) == {"middle"}

    def test_named_layers_cost_nothing_of_it(self):
        assert kept(100, also_keep=frozenset({"large"})) == {"middle", "large"}

    def test_scale_of_effects_does_not_matter(self):
        for budget in range(0, 1200, 7):
            scaled = {name: 1e-9 * effect for name, effect in EFFECTS.items()}
            assert kept(budget, scaled) == kept(budget)


class TestReasons:
    def test_are_told(self):
        layers = {**statistics("small", "large", "middle"), **statistics("nan", output=math.nan)}
        chosen = ByEffect(100, EFFECTS, COSTS, frozenset({"small"})).choose(layers)
        assert chosen == {
            "small": Reason.KEPT_BY_NAME,
            "large": Reason.QUANTIZED,
            "middle": Reason.KEPT_EFFECT,
            "nan": Reason.KEPT_NOT_FINITE,
        }

    def test_are_the_plans(self):
        weights = {name: torch.randn(4, 2) for name in (*EFFECTS, "unmeasured")}
        planner = Planner(statistics(*EFFECTS), ByEffect(100, EFFECTS, COSTS))
        for name, weight in weights.items():
            planner.clipping_of(name, weight)
        plan = planner.finish()
        assert plan.kept == ["middle", "unmeasured"]
        assert plan.layers["middle"].reason is Reason.KEPT_EFFECT
        assert plan.layers["unmeasured"].reason is Reason.KEPT_UNMEASURED


class TestWrongInput:
    def test_a_budget_below_zero(self):
        with pytest.raises(ValueError, match="0 or more, not -1"):
            ByEffect(-1, EFFECTS, COSTS)

    def test_effects_of_another_model(self):
        with pytest.raises(ValueError, match="it has no layer 'other'"):
            ByEffect(1, {"other": 1.0}, COSTS)

    def test_what_is_handed_over_may_change_after(self):
        effects = dict(EFFECTS)
        selection = ByEffect(100, effects, COSTS)
        effects.clear()
        assert selection.effects == EFFECTS


def test_a_layer_that_is_no_larger_in_16_bit_is_kept():
    costs = {"small": 0, "large": -8, "middle": 100}
    chosen = ByEffect(0, EFFECTS, costs).choose(statistics(*EFFECTS))
    assert chosen == {
        "small": Reason.KEPT_EFFECT, "large": Reason.KEPT_EFFECT, "middle": Reason.QUANTIZED,
    }  # fmt: skip
