"""Compensated rounding: the rounding errors of a layer's weights cancel in its output.

If every weight is rounded to the nearest value, the errors add up at random. Here the columns are
rounded one after the other, and each is moved to cancel the errors of those before it. How far
errors can cancel depends on the layer's inputs, whose second moments a sketch holds. Amax, scale
and format are those of nearest rounding: only the bytes differ.
"""

from __future__ import annotations

import math

import torch

from . import compensate_kernels, kernels
from .feedback import Feedback, feedback_of
from .fp8 import quantize, storing_of
from .storing import Storing, for_rows

CHECKED = 8
"""Number of a sketch's last rows that rounding does not use, so that they measure its error."""

_AGAIN = 1  # how often all columns are rounded again
_BLOCK = 32  # number of columns after which their errors are applied to the rest of the matrix


def usable_rows(weight: torch.Tensor, sketch: torch.Tensor | None) -> torch.Tensor | None:
    """Return the rows of a sketch to round a weight by, on `device_for(weight)`.

    None if rounding must be to the nearest: the sketch does not fit, or something is not finite.

    Args:
        weight: (out, in, ...).
        sketch: (K, in) on any device, or None.
    """
    if sketch is None or weight.ndim < 2 or sketch.shape[1:] != weight.shape[1:2]:
        return None  # not recorded; or a grouped convolution, whose weight has fewer channels
    if not sketch.numel():
        return None
    rows = sketch[: max(1, len(sketch) - CHECKED)].to(device_for(weight))
    largest, finite = rows.abs().amax(), weight.isfinite().all().to(rows.device)
    return rows if (finite & largest.isfinite() & (largest > 0)).item() else None


def quantize_compensated(
    weight: torch.Tensor, amax: float | torch.Tensor, sketch: torch.Tensor | None, *, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store a weight as FP8 with the least error of the layer's output, not of each weight.

    Each position of a convolution's kernel is rounded on its own, like a Linear.

    Args:
        weight: (out, in, ...), any floating dtype.
        amax: clipping magnitude in the weight's units, above 0.
        sketch: (K, in) floating, on any device; S^T S / K estimates the sum of x x^T over the
            layer's inputs x. Its scale does not matter, and its last CHECKED rows are not used.
        scaled: as for `fp8.quantize`.

    Returns:
        A weight and scale as from `fp8.quantize`; exactly its result without `usable_rows`.
        One device always gives the same bytes. Two devices may round a value differently that lies
        almost in the middle of two FP8 values, and then later columns of that row as well.
    """
    rows = usable_rows(weight, sketch)
    if rows is None:
        return quantize(weight, amax, scaled=scaled)
    storing = storing_of(weight.to(rows.device), amax, scaled=scaled)
    return compensated(weight, storing, rows), storing.scale.to(weight.device)


def device_for(weight: torch.Tensor) -> torch.device:
    """Return where a weight is rounded: on the CPU for other devices than CUDA's.

    Some lack FP64 or FP8, and without our kernel each column would take several launches.
    """
    return weight.device if weight.is_cuda else torch.device("cpu")


def compensated(weight: torch.Tensor, storing: Storing, rows: torch.Tensor) -> torch.Tensor:
    """Return a weight with compensated rounding, in the dtype `storing.stored`.

    Args:
        weight: see quantize_compensated.
        storing: of the weight, on the device of `rows`.
        rows: its `usable_rows`.
    """
    feedback = feedback_of(rows)
    columns = _columns(storing.scaled(weight.detach().to(rows.device)))
    rounded = _round(columns[feedback.order].to(torch.float32), feedback, storing)
    stored = torch.empty_like(rounded, dtype=torch.uint8)
    stored[feedback.order] = rounded.view(torch.uint8)
    by_channel = weight.movedim(1, 0).shape
    stored = stored.view(by_channel).movedim(0, 1).contiguous()
    return stored.view(storing.stored).to(weight.device)


def output_error(
    weight: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor, sketch: torch.Tensor
) -> torch.Tensor:
    """Return |(W - Q) x| / |W x| over the inputs x of a sketch, estimated from its CHECKED rows.

    Rounding did not use those rows. The others would give too small an error, because rounding made
    it small for them. An FP64 scalar tensor on the weight's device; nan if the sketch has another
    number of channels, or all inputs were 0.

    Args:
        weight: (out, in, ...) of any floating dtype.
        quantized: float8_e4m3fn or int8 of the weight's shape.
        scale: FP32, its weight_scale: a scalar, or one number for each output row.
        sketch: (K, in), on any device.
    """
    if sketch.shape[1:] != weight.shape[1:2]:
        return torch.tensor(math.nan, dtype=torch.float64)
    checked = sketch[-CHECKED:].to(weight.device, torch.float32)
    columns = _columns(weight).to(torch.float32)
    rest = columns - _columns(quantized.to(torch.float32) * for_rows(scale, weight))
    # Apple's GPUs lack FP64, and hold few numbers here.
    device = device_for(weight)
    error, power = (
        (checked @ part).to(device).square().sum(dtype=torch.float64) for part in (rest, columns)
    )
    return (error / power).sqrt()


def _columns(weight: torch.Tensor) -> torch.Tensor:
    """Return (in, out * kernel places), a row for each input channel."""
    return weight.detach().movedim(1, 0).flatten(1)


def _round(columns: torch.Tensor, feedback: Feedback, storing: Storing) -> torch.Tensor:
    """Return (C, rows) as stored of columns (C, rows) FP32: GPTQ, then coordinate descent."""
    one_pass = compensate_kernels.round_columns if kernels.usable(columns.device) else round_columns
    directions = feedback.directions
    error = columns.new_zeros(columns.shape[1], directions.shape[1])
    stored = one_pass(columns, columns, error, feedback.answers, directions, storing)
    alone = directions * feedback.shares
    own = (alone * directions).sum(1, keepdim=True)
    for _ in range(_AGAIN):
        values = stored.to(torch.float32)
        rest = columns - values
        error = rest.mT @ directions
        # A column's own error does not count: it moves only to cancel those of the others.
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
        bases: (C, rows) FP32, scaled: what each column should be if the output had no error.
        values: (C, rows) FP32, the columns with which `error` was computed.
        error: (rows, K) FP32, the error of the output so far; it may be changed.
        answers: (C, K) FP32, how far a column moves for each part of the error.
        directions: (C, K) FP32, what is added to each part of the error if a column is lowered
            by 1.
        storing: how values are clipped and rounded.

    Returns:
        (C, rows) in `storing.stored`.
    """
    stored = torch.empty_like(bases, dtype=storing.stored)
    for start in range(0, len(bases), _BLOCK):
        part = slice(start, start + _BLOCK)
        wanted = torch.addmm(bases[part], answers[part], error.mT)
        coupling = answers[part] @ directions[part].mT
        lowered = _round_block(values[part], wanted, coupling, stored[part], storing)
        error.addmm_(lowered.mT, directions[part])
    return stored


def _round_block(
    values: torch.Tensor,
    wanted: torch.Tensor,
    coupling: torch.Tensor,
    stored: torch.Tensor,
    storing: Storing,
) -> torch.Tensor:
    """Round a block's columns into `stored`, and return by how much each was lowered.

    Args:
        values: (B, rows) FP32, see round_columns.
        wanted: (B, rows) FP32, moved by the errors of all earlier blocks; it is changed.
        coupling: (B, B) FP32, what is added to each later column if a column is lowered by 1.
        stored: (B, rows) in `storing.stored`; it is written to.
        storing: how values are clipped and rounded.
    """
    lowered = torch.empty_like(values)
    for index, value in enumerate(wanted):
        stored[index] = storing.castable(value)
        torch.sub(values[index], stored[index].to(torch.float32), out=lowered[index])
        after = slice(index + 1, None)
        wanted[after].addr_(coupling[after, index], lowered[index])
    return lowered
