"""What was searched once is not searched again, for any keep_ratio."""

import json
import math

import pytest
import torch
from helpers import gaussian, importance_of, make_planner
from hswq.quant import Findings, SearchSettings, make_plan

QUICK = SearchSettings(bins=64, candidates=10, refinements=1)
COUNT = 8
AMAX = [2.0, None, 0.0, math.inf, 7.0]


class Measured:
    """One layer's statistics, as a Plan reads them."""

    def __init__(
        self,
        sensitivity: float,
        importance: torch.Tensor | None = None,
        input_amax: float | None = None,
    ) -> None:
        self.sensitivity = sensitivity
        self.importance = importance
        self.input_amax = input_amax


@pytest.fixture
def layers() -> dict[str, torch.Tensor]:
    return {f"layer{index}": gaussian(6, 4, seed=index) for index in range(COUNT)}


@pytest.fixture
def statistics() -> dict[str, Measured]:
    """Of all layers but the last; of one they are not finite, of another of other channels."""
    found = {
        f"layer{index}": Measured(float(value), importance_of("random", 4), AMAX[index])
        for index, value in enumerate([3, 1, 4, 1, 5])
    }
    return {**found, "layer5": Measured(math.nan), "layer6": Measured(2.0, torch.ones(9))}


def plan(layers, statistics, keep_ratio, known=None, scaled=True):
    """Return a Plan and the names of the layers whose weights were looked at."""
    planner = make_planner(statistics, keep_ratio, scaled=scaled, settings=QUICK, known=known)
    searched = [name for name in layers if planner.searches(name)]
    for name, weight in layers.items():
        planner.clipping_of(name, weight if name in searched else None)
    return planner.finish(), searched


@pytest.mark.parametrize("scaled", [False, True])
class TestKnown:
    @pytest.mark.parametrize("ratio", [0, 0.2, 0.5, 0.7, 1])
    def test_gives_the_plan_of_any_ratio_without_a_search(self, layers, statistics, scaled, ratio):
        known = Findings.of(make_plan(layers, statistics, 0, scaled, QUICK), 40)
        expected = make_plan(layers, statistics, ratio, scaled, QUICK)
        found, searched = plan(layers, statistics, ratio, known, scaled)
        assert not searched
        assert found == expected
        planner = make_planner(statistics, ratio, scaled=scaled, settings=QUICK, known=known)
        assert planner.known_plan() == expected

    def test_largest_inputs_are_in_plans_and_what_is_kept_of_them(self, layers, statistics, scaled):
        expected = [2.0, None, 0.0, None, 7.0, None, None, None]
        known = Findings.of(make_plan(layers, statistics, 0.5, scaled, QUICK), 40)
        known = Findings.from_json(json.loads(json.dumps(known.to_json(), allow_nan=False)))
        for source in (
            make_planner(statistics, 0.5, scaled=scaled),
            make_plan(layers, statistics, 0.5, scaled, QUICK),
            make_planner(statistics, 0, scaled=scaled, known=known),
            plan(layers, statistics, 0, known, scaled)[0],
        ):
            assert [source.input_amax(name) for name in layers] == expected

    def test_only_what_is_missing_is_searched(self, layers, statistics, scaled):
        first, searched = plan(layers, statistics, 0.5, scaled=scaled)
        assert searched == first.quantized
        known = Findings.of(first, 40)
        planner = make_planner(statistics, 0, scaled=scaled, settings=QUICK, known=known)
        assert planner.known_plan() is None
        second, searched = plan(layers, statistics, 0, known, scaled)
        assert set(searched) == set(second.quantized) - set(first.quantized)
        assert second == make_plan(layers, statistics, 0, scaled, QUICK)
        known = known.including(second)
        assert known.samples == 40
        for ratio in (0, 0.3, 0.5, 1):
            assert not plan(layers, statistics, ratio, known, scaled)[1]

    def test_including_keeps_what_a_plan_did_not_search(self, layers, statistics, scaled):
        known = Findings.of(make_plan(layers, statistics, 0, scaled, QUICK), 40)
        again = known.including(make_plan(layers, statistics, 1, scaled, QUICK))
        assert again.to_json() == known.to_json()


class TestSelection:
    def test_is_by_the_known_sensitivities(self, layers, statistics):
        """So that Plans for two ratios are of the same statistics, while more is recorded."""
        known = Findings.of(make_plan(layers, statistics, 0, True, QUICK), 40)
        kept = make_plan(layers, statistics, 0.5, True, QUICK).kept
        for measured in statistics.values():
            measured.sensitivity = -measured.sensitivity
        assert plan(layers, statistics, 0.5, known)[0].kept == kept
        assert plan(layers, statistics, 0.5)[0].kept != kept

    def test_without_statistics_everything_is_quantized(self, layers):
        first = make_plan(layers, None, 0.25, True, QUICK)
        planner = make_planner(None, 0.25, scaled=True, settings=QUICK, known=Findings.of(first, 0))
        assert planner.known_plan() == first

    def test_statistics_of_another_model_are_still_refused(self, layers, statistics):
        known = Findings.of(make_plan(layers, statistics, 0, True, QUICK), 40)
        statistics["other"] = Measured(1)
        planner = make_planner(statistics, 0, scaled=True, settings=QUICK, known=known)
        with pytest.raises(ValueError, match="belong to another model"):
            planner.known_plan()

    def test_nothing_known_is_no_plan(self, statistics):
        assert make_planner(statistics, 0.25, scaled=True).known_plan() is None


class TestJson:
    @pytest.fixture
    def findings(self, layers, statistics) -> Findings:
        return Findings.of(make_plan(layers, statistics, 0.34, True, QUICK), 40)

    def test_round_trip(self, findings, layers, statistics):
        text = json.dumps(findings.to_json(), allow_nan=False)
        again = Findings.from_json(json.loads(text))
        assert json.dumps(again.to_json()) == text
        assert list(again.layers) == list(layers)
        before, after = (plan(layers, statistics, 0.5, known)[0] for known in (findings, again))
        assert before == after
        assert len(after.warnings) == 1
        assert math.isnan(again.layers["layer5"].sensitivity)
        assert again.layers["layer7"].sensitivity is None

    @pytest.mark.parametrize(
        "damage",
        [
            {"layers": None},
            {"layers": {"a": {}}},
            {"layers": {"a": 1}},
            {"layers": {"a": {"sensitivity": "x", "amax": 1, "relative_error": 1}}},
            {"samples": "many"},
        ],
    )
    def test_that_is_none_is_refused(self, findings, damage):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            Findings.from_json({**findings.to_json(), **damage})
