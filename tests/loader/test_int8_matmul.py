"""Products in INT8: exactly what rounding each row of the input and of the weight gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from harness.inprocess import distance, load, patched, sample
from harness.patches import patch_file
from hswq.loader.engine import int8_matmul
from hswq.loader.engine.layout import QuantizedTensor, hold
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.engine.matmul import multiplied
from hswq.quant import FP8_SCALED, INT8, BySensitivity, Planner, SearchSettings, int8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weight_of(rows: int, columns: int) -> QuantizedTensor:
    values = torch.randn((rows, columns), generator=torch.Generator().manual_seed(0)) * 0.05
    data, scale = int8.quantize(values.to(DEVICE), values.abs().amax().item())
    weight = hold(data, scale, torch.float16)
    weight._params = dataclasses.replace(weight._params, multiplies=True)
    return weight


def expected(inputs: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the product in float64 of the input's rows, each rounded by its own scale."""
    rows = inputs.cpu().double()
    scale = rows.abs().amax(-1, keepdim=True) / 127
    whole = (rows / scale).round()
    exact = weight._qdata.cpu().double() * weight._params.scale.cpu().double()
    return (whole * scale) @ exact.mT + bias.cpu().double()


@pytest.mark.parametrize("shape", [(33, 64), (2, 5, 96), (1, 48)])
@pytest.mark.parametrize("rows", [40, 17])
def test_are_exact(shape, rows):
    weight = weight_of(rows, shape[-1])
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found = multiplied(inputs, weight, bias)
    assert found.shape == (*shape[:-1], rows)
    exact = expected(inputs, weight, bias)
    # One value of an input that lies in the middle between two may go the other way.
    assert (found.cpu().double() - exact).norm() < 1e-3 * exact.norm()
    assert ((found.cpu().double() - exact).abs() < 1e-5 * exact.abs().max()).float().mean() > 0.9


@pytest.mark.parametrize("biased", [False, True])
def test_compiled_they_are_one_graph(biased):
    weight = weight_of(40, 64)
    inputs = torch.randn((2, 33, 64), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    bias = torch.ones(40, device=DEVICE) if biased else None
    compiled = torch.compile(multiplied, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(inputs, weight, bias).equal(multiplied(inputs, weight, bias))
    torch.compiler.reset()


def test_only_where_it_was_asked_for():
    weight = weight_of(16, 32)
    inputs = torch.ones(4, 32, device=DEVICE)
    assert multiplied(inputs, weight, None) is not None
    assert multiplied(inputs, weight.dequantize(), None) is None
    assert multiplied(inputs[:0], weight, None) is None
    with torch.inference_mode(False):
        needs = torch.ones(4, 32, device=DEVICE, requires_grad=True)
    assert multiplied(needs, weight, None) is None
    weight._params = dataclasses.replace(weight._params, multiplies=False)
    assert multiplied(inputs, weight, None) is None


class TestModel:
    @pytest.fixture
    def planner(self, statistics):
        return lambda number_format=INT8: Planner(
            statistics, BySensitivity(0.1), number_format, settings=SearchSettings(64, 8, 0)
        )

    def test_linears_multiply_and_pictures_stay_near(self, memory, checkpoint, models, planner):
        patcher = load_checkpoint(str(checkpoint), planner(), int8_matmul=True, only_model=True)[0]
        plain = load_checkpoint(str(checkpoint), planner(), only_model=True)[0]
        count = int(int8_matmul.description(patcher).split(" multiply in INT8")[0])
        assert count > 100
        assert int8_matmul.description(plain) == "0 multiply in INT8"
        ours, ordinary = sample(patcher), sample(plain)
        assert 0 < distance(ours, ordinary) < 0.3
        lora = patch_file("LoRA")
        load(patched(patcher, lora))
        assert int8_matmul.description(patcher).startswith(f"{count} ")
        again, arguments = patcher.cached_patcher_init
        found = again(*arguments, disable_dynamic=True)
        assert int8_matmul.description(found).startswith(f"{count} ")

    def test_fp8_layers_do_not(self, legacy, checkpoint, planner):
        patcher = load_checkpoint(
            str(checkpoint), planner(FP8_SCALED), int8_matmul=True, only_model=True
        )[0]
        assert int8_matmul.description(patcher) == "0 multiply in INT8"

    def test_a_device_that_cannot_is_named(self, legacy, checkpoint, planner, monkeypatch):
        monkeypatch.setattr(int8_matmul.comfy_kitchen, "int8_linear", None)
        int8_matmul.usable.cache_clear()
        patcher = load_checkpoint(str(checkpoint), planner(), int8_matmul=True, only_model=True)[0]
        assert "has no INT8 matrix products" in int8_matmul.description(patcher)
        monkeypatch.undo()
        int8_matmul.usable.cache_clear()
