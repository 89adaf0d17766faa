"""A Triton kernel that rounds a layer's columns one after the other, in one launch.

The rows of a weight are independent of each other. So each program takes some rows through all
columns, and keeps the error of their outputs in registers.
"""

from __future__ import annotations

import torch

from .launching import launch, tl, triton
from .storing import Storing

_ROWS = 16  # rows of the weight in a program
_WARPS = 4


def round_columns(
    bases: torch.Tensor,
    values: torch.Tensor,
    error: torch.Tensor,
    answers: torch.Tensor,
    directions: torch.Tensor,
    storing: Storing,
) -> torch.Tensor:
    """Round one column after the other, in one launch; see compensate.round_columns."""
    count, rows = bases.shape
    size = len(error)
    stored = torch.empty_like(bases, dtype=torch.uint8)
    bound = torch.as_tensor(storing.bound, dtype=torch.float32, device=bases.device)
    matrices = (one.contiguous() for one in (bases, values, error, answers, directions))
    launch(
        _round_columns, (triton.cdiv(rows, _ROWS),),
        *matrices, bound, stored, count, rows, size,
        HALF=storing.dtype is torch.float16, INT8=storing.stored is torch.int8, ROWS=_ROWS,
        SIZE=max(16, triton.next_power_of_2(size)), num_warps=_WARPS,
    )  # fmt: skip
    return stored.view(storing.stored)


if triton is not None:

    @triton.jit
    def _round_to_fp8(value, bound, HALF: tl.constexpr):  # noqa: N803
        """Return the e4m3fn byte nearest to a value (ties to even), and the byte's value."""
        if HALF:
            value = value.to(tl.float16).to(tl.float32)
        magnitude = tl.minimum(tl.abs(value), bound)
        bits = magnitude.to(tl.int32, bitcast=True)
        # FP32 keeps 23 bits of the mantissa, e4m3fn 3.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) << 20
        # Below 2^-6, e4m3fn's numbers are 2^-9 apart, as FP32's are at 2^14: adding that rounds.
        shifted = magnitude + 16384.0
        steps = shifted.to(tl.int32, bitcast=True) & 0xF
        is_normal = magnitude >= 0.015625
        byte = tl.where(is_normal, (normal >> 20) - 960, steps)
        rounded = tl.where(is_normal, normal.to(tl.float32, bitcast=True), shifted - 16384.0)
        negative = value.to(tl.int32, bitcast=True) < 0
        byte = tl.where(negative, byte | 0x80, byte)
        return byte.to(tl.uint8), tl.where(negative, -rounded, rounded)

    @triton.jit
    def _round_to_int8(value, bound):
        """The byte of the whole number next to a value, ties to the even one, and that number."""
        magnitude = tl.minimum(tl.abs(value), bound)
        # From 2^23 on, FP32 has whole numbers only.
        rounded = (magnitude + 8388608.0) - 8388608.0
        rounded = tl.where(value < 0, -rounded, rounded)
        return (rounded.to(tl.int32) & 0xFF).to(tl.uint8), rounded

    # Triton would make a count of 1 a constant, from which the loop could not count down.
    @triton.jit(do_not_specialize=["count"])
    def _round_columns(
        bases, values, errors, answers, directions, bound, stored, count, rows, size,
        HALF: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        part = tl.arange(0, SIZE)
        used = part < size
        limit = tl.load(bound)
        at = part.to(tl.int64)[None, :] * rows + row[:, None]
        error = tl.load(errors + at, mask=used[None, :] & inside[:, None], other=0.0)
        base = tl.load(bases + row, mask=inside, other=0.0)
        value = tl.load(values + row, mask=inside, other=0.0)
        answer = tl.load(answers + part, mask=used, other=0.0)
        direction = tl.load(directions + part, mask=used, other=0.0)
        left = count
        while left > 0:
            # The next column's values are loaded while this one is computed.
            left -= 1
            bases, values = bases + rows, values + rows
            answers, directions = answers + size, directions + size
            next_base = tl.load(bases + row, mask=inside & (left > 0), other=0.0)
            next_value = tl.load(values + row, mask=inside & (left > 0), other=0.0)
            next_answer = tl.load(answers + part, mask=used & (left > 0), other=0.0)
            next_direction = tl.load(directions + part, mask=used & (left > 0), other=0.0)
            wanted = base + tl.sum(error * answer[None, :], 1)
            if INT8:
                byte, rounded = _round_to_int8(wanted, limit)
            else:
                byte, rounded = _round_to_fp8(wanted, limit, HALF)
            tl.store(stored + row, byte, mask=inside)
            stored += rows
            error += (value - rounded)[:, None] * direction[None, :]
            base, value, answer, direction = next_base, next_value, next_answer, next_direction
