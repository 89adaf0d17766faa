"""Kernels: all used before a load needs them, and for cards that this machine does not have."""

from __future__ import annotations

import functools

import pytest
import torch
from harness.compileonly import STATIC_SHARED, compiled, compiling_for, resources
from helpers import gaussian
from hswq.calibration import LayerStatistics, Statistics, sketch_kernels
from hswq.calibration import kernels as calibration_kernels
from hswq.calibration.sketch import SIZE
from hswq.quant import (
    FP8_SCALED,
    INT8,
    BySensitivity,
    Planner,
    compensate_kernels,
    kernels,
    search_kernels,
    stored,
)
from hswq.quant.ahead import rehearsals
from hswq.quant.dequantizing import dequantize
from hswq.quant.fp8 import gated_input

CPU = torch.device("cpu")
MODULES = kernels, search_kernels, compensate_kernels
LAYERS = {
    "input": (320, 4, 3, 3),
    "conv": (64, 320, 3, 3),
    "skip": (64, 192, 1, 1),
    "linear": (1280, 64),
    "time": (128, 32),
    "label": (128, 2816),
    "output": (4, 320, 3, 3),
}
"""Weights of all kinds that SDXL has, with fewer channels: of each size only its divisors count."""


def load_and_compute(number_format) -> None:
    """Do with each layer what a load does, and what its first step does."""
    numbers = {name: gaussian(*shape).half() for name, shape in LAYERS.items()}
    measured = {
        name: LayerStatistics(0.0, 1.0, 1, torch.ones(one.shape[1], dtype=torch.float64), 1)
        for name, one in numbers.items()
    }
    sketches = {name: gaussian(SIZE, one.shape[1]) for name, one in numbers.items()}
    kept = BySensitivity(0.0, frozenset({"input", "output"}))
    planner = Planner(Statistics(measured), kept, number_format, sketches=sketches)
    for name, weight in numbers.items():
        found = stored(planner, name, weight)
        if found is not None:
            dequantize(*found, torch.float16)
    gated_input(torch.zeros(3, 5120, dtype=torch.float16))


@pytest.fixture(params=[75, 86])
def card(request, monkeypatch):
    """RTX 20 and 30: Triton compiles for them, as it would if they were here."""
    monkeypatch.setattr(kernels, "usable", functools.cache(lambda _: True))
    monkeypatch.setattr(kernels, "_compiled", {})  # not what was compiled for another card
    with compiling_for(request.param):
        yield functools.partial(compiled, request.param)


def test_a_load_and_a_step_use_what_was_compiled_before(card):
    """A kernel that takes FP8 values would not be compiled at all for these cards."""
    for job in rehearsals(torch.float16, CPU, SIZE):
        job()
    kernels.tried(CPU)
    assert len(card(*MODULES)) == 8
    load_and_compute(FP8_SCALED)
    assert len(card(*MODULES)) == 8
    load_and_compute(INT8)
    assert len(card(*MODULES)) == 8 + 3
    dequantize(torch.ones(64, 64, dtype=torch.int8), torch.ones(64, 1), torch.bfloat16)
    for one in card(*MODULES):
        needs = resources(one)
        assert not needs["STACK"] and not needs["LOCAL"], one.name  # it spills no registers
        assert needs["SHARED"] <= STATIC_SHARED
        if one.name.startswith("_dequantize"):
            assert "ld.global.L1::evict_first" in one.asm["ptx"]
            assert "st.global.v4.b32" in one.asm["ptx"]  # 16 bytes at a time


def test_a_rehearsal_leaves_a_sampling_alone(card, monkeypatch):
    """It draws no random numbers, which are the user's, and uses no linear algebra of torch's."""
    for name in ("cholesky_ex", "solve_triangular"):
        monkeypatch.delattr(torch.linalg, name)
    before = torch.get_rng_state()
    for job in rehearsals(torch.float16, CPU, SIZE):
        job()
    assert torch.equal(torch.get_rng_state(), before)


def test_that_a_gpu_is_full_for_the_moment_is_not_remembered(monkeypatch):
    """Else the process would do without Triton from then on."""

    def full(_: torch.device) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "tried", full)
    before = kernels.usable.cache_info().currsize
    with pytest.raises(torch.OutOfMemoryError):
        rehearsals(torch.float16, CPU, SIZE)[0]()
    assert kernels.usable.cache_info().currsize == before


def test_recording_spills_no_registers(card, monkeypatch, request):
    lacks = "75" in request.node.name
    monkeypatch.setattr(sketch_kernels, "lacks_products", lambda _: lacks)
    inputs = torch.zeros(2, 80, 64, dtype=torch.float16)
    moments = torch.zeros(calibration_kernels.SLOTS, 3, dtype=torch.float64)
    importance = torch.zeros(64, dtype=torch.float64)
    for one in (inputs, inputs.view(2, 64, 8, 10)):
        lies = calibration_kernels.matrix_of(one)
        calibration_kernels.add_call(moments, importance, one, one, lies)
    sketch = torch.zeros(SIZE, 64, dtype=torch.bfloat16)
    sketch_kernels.add_rows(sketch, inputs, sketch_kernels.rows_of(inputs), 128, 5)
    found = card(calibration_kernels, sketch_kernels)
    assert {one.name for one in found} == {"_add_call", "_add_rows"}
    for one in found:
        assert not resources(one)["STACK"], one.name
