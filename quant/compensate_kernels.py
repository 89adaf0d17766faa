"""A Triton kernel that rounds a layer's columns one after the other, in one launch.

The rows of a weight are independent of each other. So each program takes two rows through all
columns, and keeps the error of their outputs in registers. It is one warp, which adds up without
waiting for others: that takes two thirds of the time of 16 rows in four warps (H200).
"""

from __future__ import annotations

import torch

from .launching import launch, tl, triton
from .storing import Storing

_ROWS = 2  # of the weight in a program
_WARPS = 1


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
    size = error.shape[1]
    stored = torch.empty_like(bases, dtype=torch.uint8)
    bound = storing.bound
    if not isinstance(bound, torch.Tensor):  # filled there, which nobody waits for
        bound = torch.full((), bound, dtype=torch.float32, device=bases.device)
    matrices = (one.contiguous() for one in (bases, values, error, answers, directions))
    launch(
        _round_columns, (triton.cdiv(rows, _ROWS),),
        *matrices, bound.to(torch.float32), stored, count, rows, size,
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

    @triton.jit
    def _load_four(rows, first, left, stride, at, mask):
        """Return four rows of a matrix from the row `first` on; zeros for those past the last."""
        rows += first * stride + at
        left -= first
        return (
            tl.load(rows, mask=mask & (left > 0), other=0.0),
            tl.load(rows + stride, mask=mask & (left > 1), other=0.0),
            tl.load(rows + 2 * stride, mask=mask & (left > 2), other=0.0),
            tl.load(rows + 3 * stride, mask=mask & (left > 3), other=0.0),
        )

    @triton.jit
    def _round(
        error, base, value, answer, direction, limit, stored, mask,
        HALF: tl.constexpr, INT8: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """Round a column into `stored`, and return the error with the column's own."""
        wanted = base + tl.sum(error * answer, 1, keep_dims=True)
        if INT8:
            byte, rounded = _round_to_int8(wanted, limit)
        else:
            byte, rounded = _round_to_fp8(wanted, limit, HALF)
        tl.store(stored, byte, mask=mask)
        return error + (value - rounded) * direction

    # Triton would make a count of 1 a constant, from which the loop could not count down.
    @triton.jit(do_not_specialize=["count"])
    def _round_columns(
        bases, values, errors, answers, directions, bound, stored, count, rows, size,
        HALF: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = row < rows
        part = tl.arange(0, SIZE)[None, :]
        used = part < size
        limit = tl.load(bound)
        error = tl.load(errors + row * size + part, mask=used & inside, other=0.0)
        stored += row
        b0, b1, b2, b3 = _load_four(bases, 0, count, rows, row, inside)
        v0, v1, v2, v3 = _load_four(values, 0, count, rows, row, inside)
        a0, a1, a2, a3 = _load_four(answers, 0, count, size, part, used)
        d0, d1, d2, d3 = _load_four(directions, 0, count, size, part, used)
        left = count
        while left > 0:
            # Memory takes longer to answer than a column to be rounded. So four are rounded while
            # the next four are loaded.
            e0, e1, e2, e3 = _load_four(bases, 4, left, rows, row, inside)
            w0, w1, w2, w3 = _load_four(values, 4, left, rows, row, inside)
            f0, f1, f2, f3 = _load_four(answers, 4, left, size, part, used)
            g0, g1, g2, g3 = _load_four(directions, 4, left, size, part, used)
            error = _round(error, b0, v0, a0, d0, limit, stored, inside, HALF, INT8)
            stored += rows
            error = _round(error, b1, v1, a1, d1, limit, stored, inside & (left > 1), HALF, INT8)
            stored += rows
            error = _round(error, b2, v2, a2, d2, limit, stored, inside & (left > 2), HALF, INT8)
            stored += rows
            error = _round(error, b3, v3, a3, d3, limit, stored, inside & (left > 3), HALF, INT8)
            stored += rows
            b0, b1, b2, b3 = e0, e1, e2, e3
            v0, v1, v2, v3 = w0, w1, w2, w3
            a0, a1, a2, a3 = f0, f1, f2, f3
            d0, d1, d2, d3 = g0, g1, g2, g3
            bases, values = bases + 4 * rows, values + 4 * rows
            answers, directions = answers + 4 * size, directions + 4 * size
            left -= 4
