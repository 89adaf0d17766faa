"""The importance-weighted histogram of a weight's magnitudes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import kernels, search_kernels
from .fp8 import quotient

ALL_ZERO_AMAX = 1e-7
"""Stands in for max|W| of a weight that is zero everywhere."""

_PIECE = 1 << 17  # weights
_LEAST_MAXIMUM = 1e-30
"""A weight whose values are all smaller counts as zero: 448 / amax would overflow FP32."""


class WeightedHistogram(NamedTuple):
    """How a weight's magnitudes are distributed, each weighted by its input channel's importance.

    Attributes:
        maximum: max|W|, FP32 scalar tensor.
        density: (bins,) float64, sums to 1. Bin i covers `[i, i + 1) * maximum / bins`.
        finite: bool scalar tensor, whether every weight is a finite number.
    """

    maximum: torch.Tensor
    density: torch.Tensor
    finite: torch.Tensor

    def centres(self) -> torch.Tensor:
        """Return the (bins,) float64 bin centres, from width / 2 to maximum - width / 2."""
        bins = self.density.numel()
        position = torch.arange(bins, dtype=torch.float64, device=self.density.device) + 0.5
        return position * quotient(self.maximum.to(torch.float64), bins)


def fit_importance(importance: torch.Tensor | None, channels: int) -> torch.Tensor | None:
    """Fit an importance vector to a weight's input channels.

    A shorter vector is padded with 1, and a longer one is cut, as in the original. None means that
    all channels have importance 1, and stays None. A vector of zeros gives None too, because
    nothing could be weighted by it.
    Returns a (channels,) float64 tensor on the device of `importance`.
    """
    if importance is None:
        return None
    fitted = torch.ones(channels, dtype=torch.float64, device=importance.device)
    known = min(channels, importance.numel())
    fitted[:known] = importance.flatten()[:known]
    return fitted if fitted.any() else None


def weighted_histogram(
    weight: torch.Tensor, importance: torch.Tensor | None, bins: int
) -> WeightedHistogram:
    """Build the weighted histogram of |W|.

    A value that is not finite has no place in a histogram. It counts as 0, so that the search still
    finds where to clip. When it is stored, infinity is clipped like any other value, and nan stays
    nan.

    Args:
        weight: (out, in, ...) of any floating dtype, on any device. Nothing is copied to the host.
        importance: (in,) importance of the input channels, None for all 1.
        bins: number of equal bins from 0 to max|W|.
    """
    fitted = fit_importance(importance, weight.shape[1] if weight.ndim > 1 else 1)
    count = _count_with_kernels if kernels.usable(weight.device) else _count
    maximum, sums, finite = count(weight.detach().contiguous(), fitted, bins)
    return WeightedHistogram(maximum, sums / sums.sum(), finite)


def _count(
    weight: torch.Tensor, importance: torch.Tensor | None, bins: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the maximum, (bins,) float64 sums of importance (None counts 1), and finiteness."""
    finite = torch.stack(weight.aminmax()).isfinite().all()  # nan makes both nan
    pieces = _pieces(weight)
    maximum = _positive(torch.stack([_magnitude(piece).amax() for piece in pieces]).amax())
    width = quotient(maximum, bins)
    sums = torch.zeros(bins, dtype=torch.float64, device=weight.device)
    per_channel = torch.ones((), dtype=torch.float64) if importance is None else importance
    per_channel = per_channel.to(weight.device)
    if importance is not None and weight.ndim > 2:
        per_channel = per_channel.view(-1, *[1] * (weight.ndim - 2))
    for piece in pieces:
        index = (_magnitude(piece) / width).to(torch.int64).clamp_(max=bins - 1)
        sums.index_add_(0, index.flatten(), per_channel.expand_as(index).reshape(-1))
    return maximum, sums, finite


def _magnitude(weight: torch.Tensor) -> torch.Tensor:
    return weight.nan_to_num(0, 0, 0).to(torch.float32).abs()


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a weight on the CPU into rows that its cache holds; a GPU is given all at once.

    Counting takes up to 30 bytes for each weight: at once 0.8 GiB for the largest of SDXL.
    """
    if weight.device.type != "cpu" or not weight.ndim:
        return (weight,)
    return weight.split(max(1, _PIECE // max(1, weight[0].numel())))


def _count_with_kernels(
    weight: torch.Tensor, importance: torch.Tensor | None, bins: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if importance is None:
        importance = torch.ones(1, dtype=torch.float64, device=weight.device)
    importance = importance.to(weight.device, non_blocking=True)
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        largest, finite = search_kernels.largest_magnitude(weight)
        maximum = _positive(largest)
        counts = search_kernels.add_to_histogram(weight, maximum, importance, bins)
        return maximum, counts, finite


def _positive(maximum: torch.Tensor) -> torch.Tensor:
    return torch.where(maximum > _LEAST_MAXIMUM, maximum, ALL_ZERO_AMAX)
