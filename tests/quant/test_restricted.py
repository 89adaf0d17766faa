"""Statistics that name layers which the model does not have."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import gaussian
from hswq.quant import (
    FP8_SCALED,
    BySensitivity,
    Findings,
    Planner,
    SearchSettings,
    make_plan,
)

QUICK = SearchSettings(bins=64, candidates=10, refinements=1)
LAYERS = {f"layer{index}": gaussian(6, 4, seed=index) for index in range(4)}


@dataclasses.dataclass
class Measured:
    """One layer's statistics, as a Plan reads them."""

    sensitivity: float
    importance: None = None


def measured(*names: str) -> dict[str, Measured]:
    return {name: Measured(float(number)) for number, name in enumerate(names)}


def plan(statistics, **known):
    planner = Planner(statistics, BySensitivity(0.5), FP8_SCALED, settings=QUICK, **known)
    left_out = planner.restrict(LAYERS)
    for name, weight in LAYERS.items():
        planner.clipping_of(name, weight)
    return planner.finish(), left_out


@pytest.fixture
def poisoned() -> dict[str, Measured]:
    """Of every layer, and of the most sensitive ones that another node had put in."""
    return measured(*LAYERS, "_orig_mod.layer0", "_orig_mod.layer1")


def test_others_have_no_say_in_the_plan(poisoned):
    found, left_out = plan(poisoned)
    assert left_out == ["_orig_mod.layer0", "_orig_mod.layer1"]
    assert found == make_plan(LAYERS, measured(*LAYERS), 0.5, True, QUICK)


def test_nor_where_all_is_known(poisoned):
    expected = plan(measured(*LAYERS))[0]
    known = Findings.of(expected, 32)
    planner = Planner(poisoned, BySensitivity(0.5), FP8_SCALED, settings=QUICK, known=known)
    assert planner.known_plan().quantized == expected.quantized


def test_another_models_are_refused():
    with pytest.raises(ValueError, match="belong to another model: 1 of their 4 layers"):
        plan(measured("layer0", "layer1", "layer2", "other"))


def test_nothing_is_left_out_of_the_models_own():
    assert plan(measured(*LAYERS))[1] == []
    assert plan(None)[1] == []
