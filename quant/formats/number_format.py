"""What every number format provides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from ..histogram import WeightedHistogram
from ..search import Found, SearchSettings


class NumberFormat(Protocol):
    """A way to store a weight in fewer bits.

    Attributes:
        name: the word that nodes, files and the panel use.
        title: the name of the numbers, for people.
        item_bytes: bytes of one weight.
        scale_bytes: bytes of the scale that is stored beside a layer's weights.
    """

    name: str
    title: str
    item_bytes: int
    scale_bytes: int

    def search(self, histogram: WeightedHistogram, settings: SearchSettings) -> Found:
        """Return the clipping magnitude (amax) with the least weighted error."""

    def quantize(
        self,
        weight: torch.Tensor,
        amax: float | torch.Tensor,
        sketch: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stored weight and its FP32 weight_scale, both on the weight's device."""

    def scale_of(self, amax: float) -> float:
        """Return the weight_scale that belongs to an amax."""


def bytes_of(number_format: NumberFormat, shape: Sequence[int]) -> int:
    """Return the bytes of a quantized weight of this shape, its scale included."""
    return math.prod(shape) * number_format.item_bytes + number_format.scale_bytes
