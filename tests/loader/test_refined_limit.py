"""Quantized models on disk: no more than the user allows, and none without its statistics."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from harness.refined import KEY, MODEL, fp8_layers, keep, left
from hswq.calibration import Statistics
from hswq.loader import store
from hswq.loader.store import refined

OTHER = "cd" * 32


@pytest.fixture
def layers(checkpoint: Path, choose) -> dict:
    """The toy's layers in FP8; a folder and settings of the test's own."""
    return fp8_layers(checkpoint)


class TestLimit:
    """Of so much that two of the toy's models fit."""

    @pytest.fixture
    def size(self, layers, choose) -> int:
        path = keep(layers)
        size = path.stat().st_size
        path.unlink()
        choose(RefinedGB=2.5 * size / (1 << 30))
        return size

    def keep(self, layers: dict, *numbers: int) -> None:
        """Keep models, each used before the next."""
        for number in numbers:
            path = keep(layers, self.key(number))
            if path.exists():
                os.utime(path, (number, number))

    def key(self, number: int) -> str:
        return f"{MODEL[:16]}.{number:032x}"

    def numbers(self) -> list[int]:
        return [int(name.split(".")[1], 16) for name in left()]

    def test_the_one_used_longest_ago_goes(self, layers, size):
        self.keep(layers, 1, 2, 3)
        assert self.numbers() == [2, 3]

    def test_finding_one_is_using_it(self, layers, size):
        self.keep(layers, 1, 2)
        refined.find(self.key(1)).close()
        self.keep(layers, 3)
        assert self.numbers() == [1, 3]

    def test_one_that_is_open_stays(self, layers, size):
        self.keep(layers, 1, 2)
        found = refined.find(self.key(1))
        os.utime(found.path, (1, 1))
        self.keep(layers, 3)
        assert self.numbers() == [1, 3]
        found.close()
        self.keep(layers, 4)
        assert self.numbers() == [3, 4]

    def test_the_same_one_again_costs_no_other(self, layers, size):
        self.keep(layers, 1, 2, 2, 2)
        assert self.numbers() == [1, 2]

    def test_one_that_is_larger_is_not_kept_and_costs_no_other(self, layers, size, choose, caplog):
        self.keep(layers, 1)
        larger = {f"{number}.{name}": layers[name] for name in layers for number in range(3)}
        with caplog.at_level(logging.INFO):
            keep(larger, self.key(2))
        assert "is not kept: the setting allows" in caplog.text
        assert self.numbers() == [1]

    def test_of_less_applies_to_the_next(self, layers, size, choose):
        self.keep(layers, 1, 2)
        choose(RefinedGB=1.5 * size / (1 << 30))
        self.keep(layers, 3)
        assert self.numbers() == [3]

    def test_of_0_keeps_and_finds_none(self, layers, size, choose, caplog):
        self.keep(layers, 1)
        choose(RefinedGB=0)
        assert refined.find(self.key(1)) is None
        self.keep(layers, 2)
        assert not left()
        assert not caplog.text


class TestForgotten:
    def recorded(self, of: str) -> None:
        delta = Statistics({}, {"samples": 1, "total_steps": 1})
        store.add_statistics(store.NewSums(delta, of, store.PASSIVE_SESSION, "toy.safetensors"))

    @pytest.mark.parametrize("session", [None, store.PASSIVE_SESSION])
    def test_with_the_models_statistics(self, layers, session):
        kept = {"out.2": layers["out.2"]}
        other = f"{OTHER[:16]}.{'0' * 32}"
        for of, key in ((MODEL, KEY), (OTHER, other)):
            self.recorded(of)
            keep(kept, key)
        store.remove_statistics(MODEL, session)
        assert left() == [f"{other}.safetensors"]

    def test_is_nothing_where_nothing_is_kept(self, choose):
        refined.forget(MODEL)
        assert not left()
