"""All kernels that loading a model and its first step use, to be compiled before that."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import compensate_kernels, fp8, int8, kernels, search_kernels
from .compensate import CHECKED
from .formats import INT8, NumberFormat
from .launching import triton
from .search import SearchSettings
from .storing import Storing

_SIDE = 64  # of a made-up weight: sizes that are multiples of 16 share a compiled kernel
_empty = functools.partial(torch.empty, device="meta")


def compilations(
    number_format: NumberFormat,
    dtype: torch.dtype,
    *,
    searched: SearchSettings | None,
    sketch_rows: int = 0,
) -> list[Callable[[], object]]:
    """Return functions that each compile one kernel or two for torch's current GPU.

    They call what a load calls, with tensors of torch's meta device (see launching.launch). The
    first is needed by every load.

    Args:
        number_format: of the quantized layers.
        dtype: of the weights to search and to compute with.
        searched: settings of the search; None if nothing is searched.
        sketch_rows: rows of the sketches by which rounding is compensated; 0 if it is not.
    """
    if triton is None:
        return []
    linear, conv = _empty(_SIDE, _SIDE, dtype=dtype), _empty(_SIDE, _SIDE, 3, 3, dtype=dtype)
    storing, decode = _stored_as(number_format, linear)
    found = [
        functools.partial(kernels.tried, storing.scale.device),
        functools.partial(decode, _empty(_SIDE, _SIDE, dtype=storing.stored), storing.scale, dtype),
    ]
    if searched is not None and number_format is INT8:
        shares = _empty(_SIDE, dtype=torch.float32)
        sizes = int8.SHARES, int8.STEPS
        found.append(functools.partial(search_kernels.search_rows, linear, shares, *sizes))
    elif searched is not None:
        found += _of_fp8_search(linear, conv, searched, number_format.scaled)
    if sketch_rows:
        square, rows = _empty(_SIDE, _SIDE), max(1, sketch_rows - CHECKED)
        parts = square, square, _empty(rows, _SIDE), _empty(_SIDE, rows), _empty(_SIDE, rows)
        found.append(functools.partial(compensate_kernels.round_columns, *parts, storing))
    gates = _empty(1, 2 * _SIDE, dtype=dtype)
    return [*found, functools.partial(kernels.gated_input, gates, None)]


def _stored_as(number_format: NumberFormat, weight: torch.Tensor) -> tuple[Storing, Callable]:
    """Return how a weight is stored, and what decodes it."""
    if number_format is INT8:
        scale = _empty(len(weight), 1, dtype=torch.float32)
        return int8.storing_of(weight, 0.0, None, scale), kernels.dequantize_rows
    amax = _empty((), dtype=torch.float32)
    return fp8.storing_of(weight, amax, scaled=number_format.scaled), kernels.dequantize


def _of_fp8_search(
    linear: torch.Tensor, conv: torch.Tensor, settings: SearchSettings, scaled: bool
) -> list[Callable[[], object]]:
    maximum = _empty((), dtype=torch.float32)
    importance = _empty(linear.shape[1], dtype=torch.float64)
    density = _empty(settings.bins, dtype=torch.float64)
    rounds = settings.candidates, settings.refinements
    count, partial = search_kernels.add_to_histogram, functools.partial
    return [
        partial(search_kernels.search_amax, maximum, density, *rounds, scaled=scaled),
        partial(count, linear, maximum, importance, settings.bins),
        partial(count, conv, maximum, importance, settings.bins),
        partial(search_kernels.largest_magnitude, linear),
    ]
