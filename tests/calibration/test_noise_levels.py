"""Levels of noise add up over samplings, and a sum that hides some says nothing."""

import pytest
from helpers import statistics_of
from hswq.calibration import LEVELS, NOISE_LEVELS, Statistics, noise_levels, seen_levels

ONE, OTHER = "1 0 2 0 0 0 0 5", "0 0 1 0 0 0 4 5"


def part(levels: str | None) -> Statistics:
    return statistics_of("layer", **({} if levels is None else {NOISE_LEVELS: levels}))


def falling(percent: float) -> float:
    """A schedule from 10 to 0."""
    return 10 * (1 - percent)


class TestOfASampling:
    def test_every_step_counts_at_its_level(self):
        sigmas = [falling((step + 0.5) / 16) for step in range(16)]
        assert noise_levels(sigmas, falling) == " ".join(["2"] * LEVELS)

    def test_beyond_the_schedule_are_its_ends(self):
        assert noise_levels([99.0, 0.0, 0.0], falling) == "1 0 0 0 0 0 0 2"

    def test_how_many_were_seen(self):
        assert seen_levels({NOISE_LEVELS: ONE}) == 3
        assert seen_levels({}) == LEVELS


class TestSum:
    def test_adds(self):
        total = part(ONE).merge(part(OTHER))
        assert total.meta[NOISE_LEVELS] == "1 0 3 0 0 0 4 10"

    @pytest.mark.parametrize("unknown", [None, "damaged", "1 2 3"])
    def test_with_a_part_that_does_not_say_says_nothing(self, unknown):
        for parts in ((part(ONE), part(unknown)), (part(unknown), part(ONE))):
            assert NOISE_LEVELS not in parts[0].merge(parts[1]).meta

    def test_with_nothing_is_the_same(self):
        assert Statistics().merge(part(ONE)).meta[NOISE_LEVELS] == ONE
        assert part(ONE).merge(Statistics()).meta[NOISE_LEVELS] == ONE
