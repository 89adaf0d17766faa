"""Weights, importances and statistics to test with, and what the golden file holds."""

import json
from pathlib import Path

import pytest
import torch
from hswq.calibration import LayerStatistics, Statistics
from hswq.quant import BySensitivity, Planner, fp8_format
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "data" / "hswq_reference.safetensors"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def golden(kind: str) -> list[dict]:
    """Return what the original computed: its "cases" or its "monitors"."""
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()[kind])


def golden_tensor(name: str) -> torch.Tensor | None:
    """Return a tensor of the golden file, None where it has no such one."""
    with safe_open(GOLDEN, "pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118


def generator(seed: int) -> torch.Generator:
    """Return a generator of reproducible numbers."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return FP32 weights as a trained layer has them."""
    return torch.randn(shape, generator=generator(seed)) * 0.02


def inputs_of(channels: int, rows: int = 2000, seed: int = 0) -> torch.Tensor:
    """Return (rows, channels) inputs that are alike, as a trained model's are."""
    numbers = generator(seed)
    common, few = max(1, channels // 8), torch.randn(rows, max(1, channels // 8), generator=numbers)
    mixed = few @ torch.randn(common, channels, generator=numbers)
    return mixed + 0.3 * torch.randn(rows, channels, generator=numbers)


def sketch_of(inputs: torch.Tensor, size: int = 128, seed: int = 1) -> torch.Tensor:
    """Return (size, channels) sums of the inputs, each times random signs."""
    signs = torch.randint(0, 2, (size, len(inputs)), generator=generator(seed)) * 2.0 - 1
    return signs @ inputs


WEIGHTS = {
    "gaussian": lambda normal, uniform: normal * 0.02,
    "heavy tails": lambda normal, uniform: normal * 0.02 / uniform.clamp(min=0.01),
    "outliers": lambda normal, uniform: torch.where(uniform < 0.02, normal * 5, normal * 0.01),
    "one magnitude": lambda normal, uniform: normal.sign() * 0.37,
    "three magnitudes": lambda normal, uniform: normal.sign() * (uniform * 3).ceil() * 0.3,
    "ternary": lambda normal, uniform: normal.sign() * (normal.abs() > 0.7) * 0.25,
    "powers of two": lambda normal, uniform: normal.sign() * 2.0 ** (uniform * 12 - 8).floor(),
    "uniform": lambda normal, uniform: uniform,
    "above 448": lambda normal, uniform: normal * 700,
    "below the grid": lambda normal, uniform: normal * 1e-4,
    "zeros": lambda normal, uniform: normal * 0,
}


def weight_of(kind: str, shape: tuple[int, ...], dtype=torch.float32, seed: int = 0):
    """Return weights of one of the kinds in WEIGHTS."""
    numbers = generator(seed)
    normal, uniform = torch.randn(shape, generator=numbers), torch.rand(shape, generator=numbers)
    return WEIGHTS[kind](normal, uniform).to(dtype)


IMPORTANCES = {
    "none": lambda values: None,
    "random": lambda values: values,
    "half precision": lambda values: values.half(),
    "short": lambda values: values[: max(1, len(values) // 2)],
    "long": lambda values: torch.cat((values, values)),
    "one value": lambda values: torch.ones(1),
    "spiky": lambda values: torch.where(values > 0.8, values * 1000, values * 0.001),
    "some zeros": lambda values: values * (values >= values.median()),
}


def importance_of(kind: str, channels: int, seed: int = 0) -> torch.Tensor | None:
    """Return an importance vector for so many channels, of one of the kinds in IMPORTANCES."""
    return IMPORTANCES[kind](torch.rand(channels, generator=generator(seed)) + 1e-3)


def layer_statistics(calls: int = 4, channels: int = 3, seed: int = 0) -> LayerStatistics:
    """Return sums as that many calls of a layer might leave."""
    mean, square, *importance = torch.rand(
        channels + 2, dtype=torch.float64, generator=generator(seed)
    ).tolist()
    sums = torch.tensor(importance, dtype=torch.float64) * calls
    amax = None if seed % 3 == 2 else 10 * square  # other tools' files lack it
    return LayerStatistics(mean * calls, (mean**2 + square) * calls, calls, sums, calls, amax)


def statistics_of(*names: str, calls: int = 4, seed: int = 0, **meta) -> Statistics:
    """Return statistics of layers by these names, each with sums of its own."""
    layers = {
        name: layer_statistics(calls, channels=3 + index, seed=seed * 1000 + index)
        for index, name in enumerate(names)
    }
    return Statistics(layers, meta)


def assert_same_layers(one: Statistics, other: Statistics, rel: float = 0.0) -> None:
    """Check that two Statistics have the same layers in one order, with the same sums."""
    assert list(one) == list(other)
    for name, layer in one.items():
        twin = other[name]
        assert layer.output_calls == twin.output_calls
        assert layer.input_calls == twin.input_calls
        assert layer.input_amax == twin.input_amax
        for field in ("output_sum", "output_square_sum"):
            assert getattr(layer, field) == pytest.approx(getattr(twin, field), rel=rel, abs=0)
        torch.testing.assert_close(layer.importance_sum, twin.importance_sum, rtol=rel, atol=0)


def make_planner(statistics, keep_ratio: float, *, scaled: bool, **rest) -> Planner:
    """Return a Planner that selects by sensitivity, for HSWQ's V2 or V1."""
    return Planner(statistics, BySensitivity(keep_ratio), fp8_format(scaled), **rest)
