"""A few of the samplings that `dev.py bench compositions` composes at random."""

from __future__ import annotations

import pytest
from harness.composed import Parts, check
from harness.compositions import compose
from harness.inprocess import load_16_bit
from hswq.loader.engine import loading
from toy.checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model in 16 bit."""
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    return load_16_bit(make_checkpoint(path, seed=1))


@pytest.fixture(scope="module")
def compatible(checkpoint, planner):
    """The toy quantized in compatible mode."""
    return loading.load_checkpoint(str(checkpoint), planner(scaled=False), only_model=True)[0]


@pytest.mark.parametrize("seed", [*range(8), 1000, 1007, 1033, 1058])
def test_composition(
    seed, models, other, compatible, checkpoint, statistics, recorder, choose, folder, legacy
):
    choose(Budget=100)
    parts = Parts(checkpoint, *models, compatible.clone(), other, statistics)
    check(compose(seed), parts)
