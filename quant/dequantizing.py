"""Stored weights as numbers again, of any number format."""

from __future__ import annotations

import torch

from . import fp8, int8


def dequantize(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `quantized * scale` in `dtype`, in one launch where Triton runs.

    Args:
        quantized: float8_e4m3fn or int8 tensor (out, in, ...).
        scale: FP32 weight_scale: a scalar for float8_e4m3fn, (out, 1) for int8.
        dtype: of the result.
    """
    of_dtype = int8 if quantized.dtype is torch.int8 else fp8
    return of_dtype.dequantize(quantized, scale, dtype)
