"""What storing a layer tells its Decider: its output error, which is measured only once."""

import dataclasses

import pytest
import torch
from helpers import gaussian, make_planner
from hswq.quant import Findings, KnownPlan, output_error, stored
from hswq.quant.plan import known_errors

WEIGHT = gaussian(48, 32)
SKETCHES = {"layer": torch.randn(32, 32, generator=torch.Generator().manual_seed(1))}


def planner(sketches, **how):
    return make_planner(None, 0.0, scaled=True, sketches=sketches, **how)


@pytest.fixture
def measured():
    """A Plan whose layer was stored with a sketch, and the layer's own error."""
    decider = planner(SKETCHES)
    error = output_error(WEIGHT, *stored(decider, "layer", WEIGHT), SKETCHES["layer"])
    return decider.finish(), error.item()


def test_is_in_the_plan(measured):
    plan, error = measured
    assert plan.layers["layer"].output_error == error > 0


def test_is_unknown_without_sketches():
    decider = planner(None)
    stored(decider, "layer", WEIGHT)
    assert decider.finish().layers["layer"].output_error is None


@pytest.mark.parametrize("again", [KnownPlan, lambda plan, sketches: planner(
    sketches, known=Findings.of(plan, 0)
)])  # fmt: skip
def test_that_is_known_is_not_measured_again(measured, again):
    """One that no measuring could find stays as it is."""
    plan, _ = measured
    told = plan.with_output_errors({"layer": 0.125})
    decider = again(told, SKETCHES)
    stored(decider, "layer", WEIGHT)
    assert decider.finish().layers["layer"].output_error == 0.125


def test_of_a_plan_that_has_none_is_measured(measured):
    plan, error = measured
    layers = {
        name: dataclasses.replace(one, output_error=None) for name, one in plan.layers.items()
    }
    decider = KnownPlan(dataclasses.replace(plan, layers=layers), SKETCHES)
    stored(decider, "layer", WEIGHT)
    assert decider.finish() == plan
    assert known_errors(plan.layers) == {"layer": error}


def test_of_a_layer_that_is_kept_is_in_no_plan(measured):
    plan, _ = measured
    kept = make_planner(None, 0.0, scaled=True, sketches=SKETCHES, known=Findings.of(plan, 0))
    kept.selection = dataclasses.replace(kept.selection, also_keep=frozenset({"layer"}))
    assert stored(kept, "layer", WEIGHT) is None
    assert kept.finish().layers["layer"].output_error is None
