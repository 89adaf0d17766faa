"""The search for the clipping magnitude (amax) that gives the least weighted error."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from . import kernels, search_kernels
from .fp8 import FP8_MAX, positive_grid, quotient, round_to_grid
from .histogram import WeightedHistogram, weighted_histogram

SEARCH_LIMITS = {"bins": (2, 65536), "candidates": (2, 10000), "refinements": (0, 50)}
"""The range of each search setting, both ends included."""


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How finely amax is searched; the defaults are the original's.

    Attributes:
        bins: bins of the weighted histogram.
        candidates: amax values tried in each round.
        refinements: rounds after the first, each around the best amax so far. A round reaches a
            quarter of the last range to either side.
    """

    bins: int = 4096
    candidates: int = 200
    refinements: int = 3

    def __post_init__(self) -> None:
        for name, (least, most) in SEARCH_LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(
                    f"{name} must be a whole number from {least} to {most}, got {value!r}"
                )


DEFAULT_SETTINGS = SearchSettings()
_FINALISTS = 8


def candidate_errors(
    histogram: WeightedHistogram, candidates: torch.Tensor, *, scaled: bool
) -> torch.Tensor:
    """Return every candidate's weighted mean squared error, summed over the histogram's bins.

    For an amax a it is `sum H * (q(centre, a) - centre)^2`, where q rounds to the FP8 grid.

    Args:
        histogram: of one weight.
        candidates: (candidates,) FP32 amax values.
        scaled: True for the rounding of V2, False for V1.

    Returns:
        (candidates,) float64.
    """
    centres = histogram.centres()
    values = centres.to(torch.float32)
    amax = candidates[:, None]
    if scaled:
        factor = quotient(FP8_MAX, amax)
        rounded = round_to_grid((values * factor).clamp_(max=FP8_MAX)) / factor
    else:
        rounded = round_to_grid(torch.minimum(values, amax.clamp(max=FP8_MAX)))
    return (rounded.to(torch.float64) - centres).square_() @ histogram.density


class _GridErrors:
    """The same errors, computed faster: a term for each of 127 grid values, not for each bin.

    All bins between two rounding boundaries are rounded to one grid value q. With c for a bin's
    centre, their error is `q^2 sum H - 2 q sum H c + sum H c^2`. Prefix sums over the bins give the
    three sums. The terms cancel, so an error is only exact to about 1e-16 of the weight's mean
    square. That is why search_amax measures the best candidates again.
    """

    def __init__(self, histogram: WeightedHistogram, *, scaled: bool) -> None:
        self._scaled = scaled
        centres, density = histogram.centres(), histogram.density
        self._values = centres.to(torch.float32)
        moments = torch.stack((density, density * centres))
        self._sums = torch.nn.functional.pad(moments.cumsum(1), (1, 0))
        self.power = density @ centres.square()
        self._grid = positive_grid(centres.device)
        self._midpoints = (self._grid[1:] + self._grid[:-1]) / 2
        self._unscaled_edges = None if scaled else self._edges(self._values[None])

    def __call__(self, candidates: torch.Tensor) -> torch.Tensor:
        """Return the (candidates,) float64 errors."""
        amax = candidates[:, None]
        if self._scaled:
            factor = quotient(FP8_MAX, amax)
            edges = self._edges(self._values * factor)
            levels = self._grid / factor
        else:
            edges = self._unscaled_edges
            levels = torch.minimum(self._grid, round_to_grid(amax.clamp(max=FP8_MAX)))
        levels = levels.to(torch.float64)
        mass, first_moment = self._sums[:, edges].diff()
        return self.power + (levels * (levels * mass - 2 * first_moment)).sum(1)

    def _edges(self, values: torch.Tensor) -> torch.Tensor:
        """Return the (rows, 128) bin indices where each grid value's bins begin and end."""
        rows, bins = values.shape
        midpoints = self._midpoints.expand(rows, -1).contiguous()
        inner = torch.searchsorted(values, midpoints, right=True)  # a tie goes down
        return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=bins)


class Found(NamedTuple):
    """What the search of one layer found, all on the histogram's device.

    Attributes:
        amax: FP32 scalar tensor.
        error: weighted mean squared error at this amax, float64 scalar tensor.
        power: weighted mean square of the weights themselves, float64 scalar tensor.
    """

    amax: torch.Tensor
    error: torch.Tensor
    power: torch.Tensor


def search_amax(
    histogram: WeightedHistogram, settings: SearchSettings = DEFAULT_SETTINGS, *, scaled: bool
) -> Found:
    """Search the best amax of one histogram.

    Everything stays on the histogram's device; nothing is copied to the host.
    """
    if kernels.usable(histogram.density.device):
        return _search_with_kernels(histogram, settings, scaled=scaled)
    maximum = histogram.maximum.to(torch.float64)
    low, high = maximum * 0.5, maximum
    best = histogram.maximum
    lowest = torch.full_like(maximum, torch.inf)
    grid_errors = _GridErrors(histogram, scaled=scaled)
    for _ in range(settings.refinements + 1):
        candidates = _evenly(low, high, settings.candidates)
        # A stable sort takes the first of equal candidates. The second sort restores their order.
        finalists = grid_errors(candidates).sort(stable=True).indices[:_FINALISTS].sort().values
        errors = candidate_errors(histogram, candidates[finalists], scaled=scaled)
        error, index = errors.min(0).values, finalists[errors.argmin()]
        better = error < lowest
        best = torch.where(better, candidates[index], best)
        lowest = torch.where(better, error, lowest)
        reach = (high - low) / 4
        low = torch.maximum(maximum * 0.1, best - reach)
        high = torch.minimum(maximum * 1.2, best + reach)
    return Found(best, lowest, grid_errors.power)


def _search_with_kernels(
    histogram: WeightedHistogram, settings: SearchSettings, *, scaled: bool
) -> Found:
    maximum, density, _ = histogram
    sizes = settings.candidates, settings.refinements
    with torch.cuda.device_of(density):  # Triton launches on the current device
        return Found(*search_kernels.search_amax(maximum, density, *sizes, scaled=scaled))


def optimal_amax(
    weight: torch.Tensor,
    importance: torch.Tensor | None = None,
    *,
    scaled: bool,
    bins: int = 4096,
    candidates: int = 200,
    refinements: int = 3,
) -> float:
    """Return the clipping magnitude with the least importance-weighted FP8 error.

    Args:
        weight: (out, in, ...) floating tensor on any device.
        importance: (in,) importance of the input channels (Dual Monitor), None for all 1.
        scaled: True for V2 (a scale per tensor), False for V1 (the fixed FP8 grid).
        bins, candidates, refinements: see SearchSettings.

    Raises:
        ValueError: a setting is out of range.
    """
    settings = SearchSettings(bins, candidates, refinements)
    histogram = weighted_histogram(weight, importance, settings.bins)
    return search_amax(histogram, settings, scaled=scaled).amax.item()


def weighted_mse(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    amax: float,
    *,
    scaled: bool,
    bins: int = 4096,
) -> float:
    """Return the weighted mean squared error of clipping `weight` at `amax` (see optimal_amax)."""
    histogram = weighted_histogram(weight, importance, bins)
    candidate = torch.tensor([amax], dtype=torch.float32, device=weight.device)
    return candidate_errors(histogram, candidate, scaled=scaled).item()


def _evenly(low: torch.Tensor, high: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` FP32 values evenly from low to high, both included, as torch.linspace does.

    torch.linspace takes no tensors, so this does the same for them. In the first half it steps up
    from low, in the second half down from high. It rounds each value once, by a fused
    multiply-add; float64 gives the same here.
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    step = quotient(high - low, count - 1).to(torch.float64)
    index = torch.arange(count, device=low.device)
    values = torch.where(index < count // 2, low + step * index, high - step * (count - 1 - index))
    return values.to(torch.float32)
