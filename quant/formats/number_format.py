"""What every number format provides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from ..search import SearchSettings


class Clipping(NamedTuple):
    """Where a layer's weights are clipped.

    Attributes:
        amax: largest magnitude that is left in any row, in the weight's units, above 0: a number,
            or an FP32 scalar tensor on the weight's device.
        row_shares: of a format with a scale for each output row, at how many parts of its largest
            weight each row is clipped (see int8.SHARES): (out,) uint8 or so many bytes. None for
            other formats, and where each row is clipped at its largest weight.
        row_scale: the FP32 weight_scale (out, 1) of such a format, if it is known already. Then
            nothing else counts.
    """

    amax: float | torch.Tensor
    row_shares: torch.Tensor | bytes | None = None
    row_scale: torch.Tensor | None = None


class Searched(NamedTuple):
    """What a search found about a layer, all of it on the weight's device.

    Attributes:
        clipping: with the least weighted error.
        error: weighted squared error, a scalar tensor.
        power: weighted squares of the weights, to divide it by.
        finite: bool scalar tensor, whether every weight is a finite number.
    """

    clipping: Clipping
    error: torch.Tensor
    power: torch.Tensor
    finite: torch.Tensor


class NumberFormat(Protocol):
    """A way to store a weight in fewer bits.

    Attributes:
        name: the word that nodes, files and the panel use.
        title: the name of the numbers, for people.
        dtype: of the stored weights.
    """

    name: str
    title: str
    dtype: torch.dtype

    def search(
        self, weight: torch.Tensor, importance: torch.Tensor | None, settings: SearchSettings
    ) -> Searched:
        """Search for the clipping with the least weighted error.

        Args:
            weight: (out, in, ...) of any floating dtype.
            importance: (in,) of the input channels, None for all 1.
            settings: how finely; a format may need none of them.
        """

    def quantize(
        self, weight: torch.Tensor, clipping: Clipping, sketch: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stored weight and its FP32 weight_scale, both on the weight's device."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the weight_scale of a weight of a shape."""


def bytes_of(number_format: NumberFormat, shape: Sequence[int]) -> int:
    """Return the bytes of a quantized weight of this shape, its FP32 scale included."""
    scale_bytes = 4 * math.prod(number_format.scale_shape(shape))
    return math.prod(shape) * number_format.dtype.itemsize + scale_bytes
