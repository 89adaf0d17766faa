"""What is done to a layer's weights before and while they are rounded, in any number format."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Storing:
    """How one layer's weights are stored.

    Attributes:
        factor: FP32 tensor that weights are multiplied by, None for 1: a scalar, or one for each
            output row in a shape that multiplies the weight.
        bound: largest magnitude that is stored. On the CPU it is a number, by which torch clips ten
            times as fast as by a tensor; elsewhere it may be a scalar tensor.
        scale: FP32 weight_scale.
        dtype: in which values are clipped.
        stored: dtype of the result; of a floating one, casting rounds.
    """

    factor: torch.Tensor | None
    bound: float | torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype
    stored: torch.dtype = torch.float8_e4m3fn

    def scaled(self, weight: torch.Tensor) -> torch.Tensor:
        """Return weights in the units in which they are stored."""
        return weight if self.factor is None else weight.to(torch.float32) * self.factor

    def clipped(self, values: torch.Tensor) -> torch.Tensor:
        """Return scaled weights, clipped to what can be stored, before they are rounded."""
        return values.to(self.dtype).clamp(-self.bound, self.bound)

    def castable(self, values: torch.Tensor) -> torch.Tensor:
        """Return scaled weights in FP32, of which a cast to `stored` is the rounded value."""
        # torch casts FP16 to FP8 number by number, but many FP32 at a time. Both give the same.
        clipped = self.clipped(values).to(torch.float32)
        return clipped if self.stored.is_floating_point else clipped.round()


def for_rows(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight_scale in a shape that multiplies a weight.

    Args:
        scale: scalar, or with one number for each output row.
        weight: (out, in, ...), of which only the number of axes matters.
    """
    return scale if scale.ndim == 0 else scale.reshape(-1, *[1] * (weight.ndim - 1))
