"""HSWQ once more, slow and obvious, written from the formulas and from nothing in the package.

What the fast code is compared with: numpy loops, float64 wherever the formulas do not say FP32.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

BYTES = torch.arange(256, dtype=torch.uint8)
GRID = BYTES.view(torch.float8_e4m3fn).to(torch.float64).numpy()
GRID = GRID[~np.isnan(GRID)]


def nearest(values: np.ndarray) -> np.ndarray:
    """Round every value to the nearest of all grid values, a tie to the smaller magnitude."""
    distance = np.abs(GRID - values.astype(np.float64)[..., None])
    nearest_ones = distance == distance.min(-1, keepdims=True)
    return GRID[np.where(nearest_ones, np.abs(GRID), np.inf).argmin(-1)]


class Histogram(NamedTuple):
    """The importance-weighted histogram of a weight."""

    maximum: float
    density: np.ndarray
    centres: np.ndarray


class Found(NamedTuple):
    """What the search found."""

    amax: float
    mse: float


def histogram(weight: torch.Tensor, importance: list[float] | None, bins: int) -> Histogram:
    """Count every weight, one by one, with the importance of its input channel."""
    magnitudes = np.abs(weight.to(torch.float32).numpy())
    maximum = float(magnitudes.max()) or float(np.float32(1e-7))
    width = np.float32(np.float32(maximum) / bins)
    channels = weight.shape[1] if weight.ndim > 1 else 1
    known = [] if importance is None else list(importance)[:channels]
    per_channel = known + [1.0] * (channels - len(known))
    counts = [0.0] * bins
    for position, magnitude in np.ndenumerate(magnitudes):
        channel = position[1] if weight.ndim > 1 else 0
        counts[min(math.floor(magnitude / width), bins - 1)] += per_channel[channel]
    centres = np.array([(index + 0.5) * maximum / bins for index in range(bins)])
    return Histogram(maximum, np.array(counts) / math.fsum(counts), centres)


def quantized(values: np.ndarray, amax: float, scaled: bool) -> np.ndarray:
    """Return q(x, a) of HSWQ.md for FP32 values."""
    amax = np.float32(amax)
    if not scaled:
        bound = np.minimum(amax, np.float32(448))
        return nearest(np.clip(values, -bound, bound))
    factor = np.float32(448) / amax
    rounded = nearest(np.clip(values * factor, np.float32(-448), np.float32(448)))
    return (rounded.astype(np.float32) / factor).astype(np.float64)


def mse(of: Histogram, amax: float, scaled: bool) -> float:
    """Return the weighted mean squared error of one amax."""
    filled = of.density > 0  # the others add nothing
    centres = of.centres[filled]
    error = quantized(centres.astype(np.float32), amax, scaled) - centres
    return math.fsum(of.density[filled] * error**2)


def search(of: Histogram, *, scaled: bool, candidates: int = 200, refinements: int = 3) -> Found:
    """Try every candidate of every round, one by one."""
    low, high = 0.5 * of.maximum, of.maximum
    best = Found(of.maximum, math.inf)
    for _ in range(refinements + 1):
        for amax in torch.linspace(low, high, candidates).tolist():
            error = mse(of, amax, scaled)
            if error < best.mse:
                best = Found(amax, error)
        reach = (high - low) / 4
        low = max(0.1 * of.maximum, best.amax - reach)
        high = min(1.2 * of.maximum, best.amax + reach)
    return best


class Moments(NamedTuple):
    """Sums over a layer's calls."""

    mean: float
    mean_square: float


def moments(outputs: list[torch.Tensor]) -> Moments:
    """Return the sums of mean(Y) and mean(Y^2) over the outputs of a layer's calls."""
    wide = [output.detach().to("cpu", torch.float64) for output in outputs]
    return Moments(
        math.fsum(output.mean().item() for output in wide),
        math.fsum((output * output).mean().item() for output in wide),
    )


def sensitivity(outputs: list[torch.Tensor]) -> float:
    """Return a layer's sensitivity from the outputs of its calls."""
    sums, calls = moments(outputs), len(outputs)
    return max(0.0, sums.mean_square / calls - (sums.mean / calls) ** 2)


def importance(inputs: list[torch.Tensor]) -> list[float]:
    """Return a layer's importance, one value per input channel, from the inputs of its calls."""
    calls = [_mean_magnitudes(value.detach().to("cpu", torch.float64).numpy()) for value in inputs]
    return [math.fsum(channel) / len(calls) for channel in zip(*calls, strict=True)]


def _mean_magnitudes(values: np.ndarray) -> list[float]:
    if values.ndim == 4:
        channels = [values[:, channel] for channel in range(values.shape[1])]
    elif values.ndim in (2, 3):
        channels = [values[..., channel] for channel in range(values.shape[-1])]
    else:
        return [1.0]
    return [float(np.abs(channel).mean()) for channel in channels]
