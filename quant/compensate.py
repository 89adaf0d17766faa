"""Rounding whose errors cancel in a layer's output: the bytes alone differ from nearest rounding.

To the nearest FP8 value, every weight's error adds to the others' as chance will have it. Here each
column's error is made up for by the columns after it, as far as the layer's inputs allow: those
whose second moments a sketch has kept. Amax, scale and format are those of `fp8.quantize`.
"""

from __future__ import annotations

import math

import torch

from . import compensate_kernels, kernels
from .feedback import Feedback, feedback_of
from .fp8 import Storing, quantize, storing_of

CHECKED = 8
"""Last rows of a sketch, which rounding does not see: what they say of its error is true."""

_AGAIN = 1  # times that all columns are rounded again
_BLOCK = 32  # columns after which the rest of the matrix learns of their errors


def can_compensate(weight: torch.Tensor, sketch: torch.Tensor | None) -> bool:
    """Whether a sketch says anything of a weight's columns; else rounding is to the nearest.

    Args:
        weight: (out, in, ...).
        sketch: (K, in), or None.
    """
    if sketch is None or weight.ndim < 2 or sketch.shape[1:] != weight.shape[1:2]:
        return False  # not recorded, or a grouped convolution, whose weight has fewer channels
    seen = _seen(sketch)
    return bool(seen.isfinite().all() & seen.any()) and bool(weight.isfinite().all())


def quantize_compensated(
    weight: torch.Tensor, amax: float | torch.Tensor, sketch: torch.Tensor | None, *, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store a weight as FP8 with the least error of the layer's output, not of each weight.

    The places of a convolution's kernel are rounded apart, each as a Linear of its own.

    Args:
        weight: (out, in, ...), any floating dtype.
        amax: clipping magnitude in the weight's units, above 0.
        sketch: (K, in) floating, on any device; S^T S / K estimates the sum of x x^T over the
            layer's inputs x. Its scale does not matter, and its last CHECKED rows are not used.
        scaled: as `fp8.quantize`.

    Returns:
        What `fp8.quantize` does, and just that where `can_compensate` says no. One device always
        gives the same bytes; another may give others where a value lies next to the middle
        between two, and in that row's later columns.
    """
    if not can_compensate(weight, sketch):
        return quantize(weight, amax, scaled=scaled)
    # Other devices lack FP64 or FP8, and all of them a launch for many columns at once.
    device = weight.device if weight.is_cuda else torch.device("cpu")
    storing = storing_of(weight.to(device), amax, scaled=scaled)
    feedback = feedback_of(_seen(sketch).to(device))
    columns = storing.scaled(_columns(weight.to(device))[feedback.order]).to(torch.float32)
    rounded = _round(columns, feedback, storing)
    stored = torch.empty_like(rounded, dtype=torch.uint8)
    stored[feedback.order] = rounded.view(torch.uint8)
    by_channel = weight.movedim(1, 0).shape
    stored = stored.view(by_channel).movedim(0, 1).contiguous()
    return stored.view(torch.float8_e4m3fn).to(weight.device), storing.scale.to(weight.device)


def output_error(
    weight: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor, sketch: torch.Tensor
) -> float:
    """Return |(W - Q) x| / |W x| over the inputs x of a sketch, as its last CHECKED rows say it.

    Those rows had no part in rounding. The others would tell of less error than there is: it was
    made small for them. nan where the sketch is not of such inputs, or they were all 0.

    Args:
        weight: (out, in, ...) of any floating dtype.
        quantized: float8_e4m3fn of the weight's shape.
        scale: FP32 scalar tensor, its weight_scale.
        sketch: (K, in), on any device.
    """
    if sketch.shape[1:] != weight.shape[1:2]:
        return math.nan
    checked = sketch[-CHECKED:].to(weight.device, torch.float32)
    columns = _columns(weight).to(torch.float32)
    rest = columns - _columns(quantized).to(torch.float32) * scale
    error, power = ((checked @ part).square().sum(dtype=torch.float64) for part in (rest, columns))
    return (error / power).sqrt().item()


def _seen(sketch: torch.Tensor) -> torch.Tensor:
    return sketch[: max(1, len(sketch) - CHECKED)]


def _columns(weight: torch.Tensor) -> torch.Tensor:
    """Return (in, out * kernel places), a row for each input channel."""
    return weight.detach().movedim(1, 0).flatten(1)


def _round(columns: torch.Tensor, feedback: Feedback, storing: Storing) -> torch.Tensor:
    """Return (C, rows) float8_e4m3fn of columns (C, rows) FP32: GPTQ, then coordinate descent."""
    one_pass = compensate_kernels.round_columns if kernels.usable(columns.device) else round_columns
    directions = feedback.directions
    error = columns.new_zeros(directions.shape[1], columns.shape[1])
    stored = one_pass(columns, columns, error, feedback.answers, directions, storing)
    alone = directions * feedback.shares
    own = (alone * directions).sum(1, keepdim=True)
    for _ in range(_AGAIN):
        values = stored.to(torch.float32)
        rest = columns - values
        error = directions.mT @ rest
        # A column's own error is no reason for it to move.
        stored = one_pass(columns - own * rest, values, error, alone, directions, storing)
    return stored


def round_columns(
    bases: torch.Tensor,
    values: torch.Tensor,
    error: torch.Tensor,
    answers: torch.Tensor,
    directions: torch.Tensor,
    storing: Storing,
) -> torch.Tensor:
    """Round one column after the other; compensate_kernels does the same in one launch.

    Args:
        bases: (C, rows) FP32, scaled: where a column is to be if nothing else were wrong.
        values: (C, rows) FP32, with which the error was computed.
        error: (K, rows) FP32, of the output; this may change it.
        answers: (C, K) FP32, how a column moves for each part of the error.
        directions: (C, K) FP32, what a column that is lowered by 1 adds to each part.
        storing: says how a value is clipped.

    Returns:
        (C, rows) float8_e4m3fn.
    """
    stored = torch.empty_like(bases, dtype=torch.float8_e4m3fn)
    for start in range(0, len(bases), _BLOCK):
        part = slice(start, start + _BLOCK)
        wanted = torch.addmm(bases[part], answers[part], error)
        coupling = answers[part] @ directions[part].mT
        lowered = _round_block(values[part], wanted, coupling, stored[part], storing)
        error.addmm_(directions[part].mT, lowered)
    return stored


def _round_block(
    values: torch.Tensor,
    wanted: torch.Tensor,
    coupling: torch.Tensor,
    stored: torch.Tensor,
    storing: Storing,
) -> torch.Tensor:
    """Round a block's columns into `stored`, and return how much each is lower by that.

    Args:
        values: (B, rows) FP32, see round_columns.
        wanted: (B, rows) FP32, moved by the errors of all blocks before; this changes it.
        coupling: (B, B) FP32, what a column that is lowered by 1 adds to each one after it.
        stored: (B, rows) float8_e4m3fn.
        storing: says how a value is clipped.
    """
    lowered = torch.empty_like(values)
    for index, value in enumerate(wanted):
        # By FP32, from which torch casts many at a time.
        stored[index] = storing.clipped(value).to(torch.float32)
        torch.sub(values[index], stored[index].to(torch.float32), out=lowered[index])
        after = slice(index + 1, None)
        wanted[after].addr_(coupling[after, index], lowered[index])
    return lowered
