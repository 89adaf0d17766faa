"""Statistics whose every sum says how many samples they are of."""

from __future__ import annotations

import torch
from hswq.calibration import LayerStatistics, Statistics

FINGERPRINT = "ab" * 32
"""Of no model."""


def delta(layers: int = 3, **meta) -> Statistics:
    """One sample; every sum is a whole number, so that no order of adding changes it."""
    importance = torch.arange(4, dtype=torch.float64)
    one = {f"layer{n}": LayerStatistics(1.0, 2.0, 1, importance, 1) for n in range(layers)}
    return Statistics(one, {"samples": 1, "total_steps": 1, "layers": 3, **meta})


def samples_of(statistics: Statistics) -> int:
    """How many samples a file has, by every one of its sums."""
    samples = statistics.samples
    for layer in statistics.values():
        assert (layer.output_sum, layer.output_square_sum) == (samples, 2 * samples)
        assert layer.output_calls == layer.input_calls == samples
        assert layer.importance_sum.tolist() == [0, samples, 2 * samples, 3 * samples]
    return samples
