"""FP8 e4m3fn: HSWQ's V2 (scaled) and V1 (plain)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from ..compensate import quantize_compensated
from ..fp8 import FP8_MAX, quantize
from ..histogram import weighted_histogram
from ..search import SearchSettings, search_amax
from .number_format import Clipping, Searched


@dataclasses.dataclass(frozen=True)
class FP8Format:
    """FP8 with one scale for each layer (V2), or without a scale (V1).

    Attributes:
        name: as in NumberFormat.
        scaled: True for V2, which stores the weight times 448 / amax. False for V1, which stores
            the weight itself, clipped at amax.
    """

    name: str
    scaled: bool
    title: ClassVar[str] = "FP8"
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def search(
        self, weight: torch.Tensor, importance: torch.Tensor | None, settings: SearchSettings
    ) -> Searched:
        """Search the clipping magnitude (amax) with the least weighted error."""
        histogram = weighted_histogram(weight, importance, settings.bins)
        amax, error, power = search_amax(histogram, settings, scaled=self.scaled)
        return Searched(Clipping(amax), error, power, histogram.finite)

    def quantize(
        self, weight: torch.Tensor, clipping: Clipping, sketch: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the float8_e4m3fn weight and its FP32 weight_scale (see quant.quantize)."""
        if sketch is None:
            return quantize(weight, clipping.amax, scaled=self.scaled)
        return quantize_compensated(weight, clipping.amax, sketch, scaled=self.scaled)

    def scale_shape(self, _: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a weight_scale: it is one number."""
        return ()

    def scale_of(self, amax: float) -> float:
        """Return the weight_scale that belongs to an amax: `amax / 448`, or 1 for V1."""
        return amax / FP8_MAX if self.scaled else 1.0


FP8_SCALED = FP8Format("scaled", scaled=True)
FP8_PLAIN = FP8Format("compatible", scaled=False)


def fp8_format(scaled: bool) -> FP8Format:
    """Return HSWQ's V2 (True) or V1."""
    return FP8_SCALED if scaled else FP8_PLAIN
