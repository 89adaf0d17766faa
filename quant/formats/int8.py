"""INT8 with a scale for each output row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from .. import int8
from ..compensate import compensated, usable_rows
from ..histogram import fit_importance
from ..search import SearchSettings
from .number_format import Clipping, Searched


@dataclasses.dataclass(frozen=True)
class INT8Format:
    """INT8 with a scale for each output row, of a convolution too; see `int8`."""

    name: ClassVar[str] = "int8"
    title: ClassVar[str] = "INT8"
    dtype: ClassVar[torch.dtype] = torch.int8

    def search(
        self, weight: torch.Tensor, importance: torch.Tensor | None, _: SearchSettings
    ) -> Searched:
        """Search where to clip each row for the least weighted error."""
        found = int8.search_rows(weight, fit_importance(importance, weight.shape[1]))
        clipping = Clipping(int8.layer_amax(found), found.shares)
        # No kernel here adds up in FP64, which Apple's GPUs lack.
        power = found.powers.sum()
        return Searched(clipping, found.errors.sum(), power + (power == 0), found.finite)

    def quantize(
        self, weight: torch.Tensor, clipping: Clipping, sketch: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the int8 weight and its weight_scale (out, 1); see int8.quantize."""
        rows = usable_rows(weight, sketch)
        if rows is None:
            return int8.stored(weight, int8.storing_of(weight, *clipping))
        storing = int8.storing_of(weight.to(rows.device), *clipping)
        return compensated(weight, storing, rows), storing.scale.to(weight.device)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a weight_scale: a number for each output row."""
        return shape[0], 1


INT8 = INT8Format()
