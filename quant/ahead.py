"""What loading a model and its first step do with every layer, done once with a made-up layer.

The first time on a machine costs seconds, in which Triton compiles our kernels. In each process,
CUDA loads each kernel that is used for the first time, which costs some tenths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import compensate_kernels, kernels
from .compensate import CHECKED
from .dequantizing import dequantize
from .formats import FP8_SCALED
from .fp8 import gated_input, storing_of
from .launching import triton
from .search import DEFAULT_SETTINGS

_SIDE = 64  # channels of a made-up layer: sizes that are multiples of 16 share a compiled kernel


def rehearsals(
    dtype: torch.dtype, device: torch.device, sketch_rows: int
) -> list[Callable[[], object]]:
    """Return functions that together use every kernel of a load in the default number format.

    None uses torch's linear algebra (cholesky and the like), which fails on a GPU if two threads
    use it for the first time together: a sampler may, at that moment. Without Triton the list is
    empty.

    Args:
        dtype: of the weights to search and to compute with.
        device: that quantizes and computes.
        sketch_rows: rows of the sketches by which rounding is compensated.
    """
    if triton is None:
        return []
    numbers = functools.partial(_numbers, device)
    return [
        # Not `usable`, which remembers a failure: the GPU may be full now, and empty in a load.
        functools.partial(kernels.tried, device),
        lambda: _store(numbers(dtype, _SIDE, _SIDE)),
        lambda: _store(numbers(dtype, _SIDE, _SIDE, 3, 3)),
        lambda: _round_columns(numbers(dtype, _SIDE, _SIDE), max(1, sketch_rows - CHECKED)),
        lambda: gated_input(numbers(dtype, 1, 2 * _SIDE)),
    ]


def _numbers(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return numbers that are not alike. torch's random ones are left to the user's seeds."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).sin().view(shape).to(device, dtype)


def _store(weight: torch.Tensor) -> None:
    """Search a layer, round it to the nearest, and decode it."""
    importance = torch.ones(_SIDE, dtype=torch.float64)
    clipping = FP8_SCALED.search(weight, importance, DEFAULT_SETTINGS).clipping
    dequantize(*FP8_SCALED.quantize(weight, clipping), weight.dtype)


def _round_columns(weight: torch.Tensor, rows: int) -> None:
    """Round a layer with compensation, where a kernel does."""
    if kernels.usable(weight.device):
        square, errors = weight.float(), _numbers(weight.device, torch.float32, _SIDE, rows)
        storing = storing_of(weight, 1.0, scaled=True)
        compensate_kernels.round_columns(square, square, errors, errors, errors, storing)
