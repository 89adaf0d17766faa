"""A Triton kernel that adds a layer's call to its sums in one launch; torch needs nine.

On a GPU, launches are most of the cost of measuring: SDXL has 794 layers, and each call takes only
microseconds. Every program sums a part in FP32 and adds it to the layer's float64 sums, so the
result equals that of sums.LayerSums with torch up to rounding.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for Windows and macOS comes without Triton
    triton = None

SLOTS = 16
"""Copies of a layer's moments: with several, programs seldom wait to add to the same address."""

MOMENTS = 3
"""Numbers in each copy: sum of mean(Y), sum of mean(Y^2), largest |X|."""

_BLOCK = 1024  # values that a program reads at a time: eight for each of its 128 threads
_WARPS = 4
_STEPS = 4, 16  # blocks that a program reads, of small tensors and of large ones
_LARGE = 1 << 21  # values of a tensor that counts as large
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Matrix(NamedTuple):
    """An input's layout in memory: a contiguous matrix of `rows` x `columns`.

    Attributes:
        planes: True if each row belongs to one channel, which is the row's number modulo channels.
            False if each column is a channel.
    """

    rows: int
    columns: int
    channels: int
    planes: bool


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether the kernel runs on a device. The first call for a GPU tries it."""
    if triton is None or device.type != "cuda" or torch.version.hip is not None:
        return False
    try:
        ones = torch.ones(2, 16, dtype=torch.float16, device=device)
        moments, importance = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((SLOTS, MOMENTS), (16,))
        )
        add_call(moments, importance, ones, 2 * ones, matrix_of(ones))
        return [*moments.sum(0).tolist(), importance.sum().item()] == [1.0, 1.0, 2.0, 32.0]
    except Exception as error:  # e.g. no compiler, or an unknown card; then torch is used
        logging.info("HSWQ: Triton is not usable on %s (%s)", device, str(error).split("\n", 1)[0])
        return False


def matrix_of(inputs: torch.Tensor) -> Matrix | None:
    """Return an input's layout in memory; None if the kernel does not know it.

    It knows contiguous (B, C, H, W), (B, T, C) and (B, C), channels-last (B, C, H, W), and
    (B, T, C) that is a transposed (B, C, T).
    """
    shape = inputs.shape
    if inputs.dtype not in _DTYPES or inputs.ndim not in (2, 3, 4) or not inputs.numel():
        return None
    if inputs.ndim == 4:
        batch, channels, height, width = shape
        if inputs.is_contiguous():
            return Matrix(batch * channels, height * width, channels, True)
        if inputs.is_contiguous(memory_format=torch.channels_last):
            return Matrix(batch * height * width, channels, channels, False)
        return None
    if inputs.is_contiguous():
        return Matrix(inputs.numel() // shape[-1], shape[-1], shape[-1], False)
    if inputs.ndim == 3 and inputs.transpose(1, 2).is_contiguous():
        return Matrix(shape[0] * shape[2], shape[1], shape[2], True)
    return None


def is_flat(output: torch.Tensor) -> bool:
    """Whether the kernel can read an output as one run of values, in any order."""
    return output.dtype in _DTYPES and (
        output.is_contiguous()
        or (output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last))
    )


def add_call(
    moments: torch.Tensor,
    importance: torch.Tensor,
    output: torch.Tensor,
    inputs: torch.Tensor,
    lies: Matrix,
) -> None:
    """Add one call of a layer to its sums, in one launch.

    Args:
        moments: (SLOTS, MOMENTS) float64 on the GPU. The totals of the first two columns are the
            sums of mean(Y) and mean(Y^2). The maximum of the third is the largest |X|, or nan.
        importance: (channels,) float64 on that GPU, the sums of mean |X|.
        output: FP16, BF16 or FP32 on that GPU; see is_flat.
        inputs: FP16, BF16 or FP32 on that GPU.
        lies: matrix_of(inputs).
    """
    count = output.numel()
    output_steps, input_steps = _STEPS[count >= _LARGE], _STEPS[inputs.numel() >= _LARGE]
    of_output = _ceil(count, _BLOCK * output_steps)
    if lies.planes:
        width = max(64, min(_BLOCK, triton.next_power_of_2(lies.columns)))
        input_steps = min(input_steps, triton.next_power_of_2(_ceil(lies.columns, width)))
        of_input = _ceil(lies.rows, _BLOCK // width) * _ceil(lies.columns, width * input_steps)
    else:
        width = max(16, min(128, triton.next_power_of_2(lies.columns)))
        of_input = _ceil(lies.rows, _BLOCK // width * input_steps) * _ceil(lies.columns, width)
    with torch.cuda.device_of(moments):  # Triton launches on the current device
        _add_call[(of_output + of_input,)](
            output, inputs, moments, importance, of_output, count,
            lies.rows, lies.columns, lies.channels,
            PLANES=lies.planes, WIDTH=width, OUTPUT_STEPS=output_steps, INPUT_STEPS=input_steps,
            BLOCK=_BLOCK, SLOTS=SLOTS, MOMENTS=MOMENTS, num_warps=_WARPS,
        )  # fmt: skip


def _ceil(count: int, size: int) -> int:
    return (count + size - 1) // size


if triton is not None:
    # The loops are unrolled so that several loads are in flight at once: most layers are too small
    # to fill the GPU with programs, so that each program waits for memory. Unrolling by 8 instead
    # of 4 would take twice the registers.

    @triton.jit
    def _add_moments(
        output, slot, program, count, STEPS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        first = program.to(tl.int64) * (STEPS * BLOCK)
        for start in tl.range(0, STEPS * BLOCK, BLOCK, loop_unroll_factor=4):
            at = first + start + tl.arange(0, BLOCK)
            value = tl.load(output + at, mask=at < count, other=0.0).to(tl.float32)
            total += value
            squares += value * value
        mean = tl.sum(total.to(tl.float64), 0) / count
        tl.atomic_add(slot, mean, sem="relaxed")
        mean_square = tl.sum(squares.to(tl.float64), 0) / count
        tl.atomic_add(slot + 1, mean_square, sem="relaxed")

    @triton.jit
    def _bits(magnitude):
        # Magnitudes are not negative, so their bits compare as the numbers do; nan is largest.
        return magnitude.to(tl.int32, bitcast=True)

    @triton.jit
    def _raise_amax(slot, largest):
        amax = tl.max(largest).to(tl.float32, bitcast=True).to(tl.float64)
        place = (slot + 2).to(tl.pointer_type(tl.int64), bitcast=True)
        tl.atomic_max(place, amax.to(tl.int64, bitcast=True), sem="relaxed")

    @triton.jit
    def _add_planes(
        inputs, importance, slot, program, rows, columns, channels,
        WIDTH: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        HEIGHT: tl.constexpr = BLOCK // WIDTH  # noqa: N806
        tiles = (columns + WIDTH * STEPS - 1) // (WIDTH * STEPS)
        row = (program // tiles) * HEIGHT + tl.arange(0, HEIGHT)
        first = (program % tiles) * (WIDTH * STEPS)
        start_of_row = (row.to(tl.int64) * columns)[:, None]
        total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
        largest = tl.zeros((HEIGHT, WIDTH), dtype=tl.int32)
        for start in tl.range(0, WIDTH * STEPS, WIDTH, loop_unroll_factor=4):
            column = (first + start + tl.arange(0, WIDTH))[None, :]
            inside = (row[:, None] < rows) & (column < columns)
            value = tl.load(inputs + start_of_row + column, mask=inside, other=0.0)
            magnitude = tl.abs(value.to(tl.float32))
            total += magnitude
            largest = tl.maximum(largest, _bits(magnitude))
        count = (rows // channels).to(tl.int64) * columns
        mean = tl.sum(total.to(tl.float64), 1) / count
        tl.atomic_add(importance + row % channels, mean, mask=row < rows, sem="relaxed")
        _raise_amax(slot, largest)

    @triton.jit
    def _add_columns(
        inputs, importance, slot, program, rows, columns,
        WIDTH: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        HEIGHT: tl.constexpr = BLOCK // WIDTH  # noqa: N806
        tiles = (columns + WIDTH - 1) // WIDTH
        column = (program % tiles) * WIDTH + tl.arange(0, WIDTH)
        first = (program // tiles) * (HEIGHT * STEPS)
        total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
        largest = tl.zeros((HEIGHT, WIDTH), dtype=tl.int32)
        for start in tl.range(0, HEIGHT * STEPS, HEIGHT, loop_unroll_factor=4):
            row = (first + start + tl.arange(0, HEIGHT))[:, None]
            inside = (row < rows) & (column < columns)[None, :]
            at = row.to(tl.int64) * columns + column[None, :]
            magnitude = tl.abs(tl.load(inputs + at, mask=inside, other=0.0).to(tl.float32))
            total += magnitude
            largest = tl.maximum(largest, _bits(magnitude))
        mean = tl.sum(total.to(tl.float64), 0) / rows
        tl.atomic_add(importance + column, mean, mask=column < columns, sem="relaxed")
        _raise_amax(slot, largest)

    # Triton compiles one variant for each kind of value of an argument. These sizes are left out of
    # that, because they make no load faster.
    @triton.jit(do_not_specialize=["of_output", "rows", "channels"])
    def _add_call(
        output, inputs, moments, importance, of_output, count, rows, columns, channels,
        PLANES: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
        OUTPUT_STEPS: tl.constexpr, INPUT_STEPS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
        SLOTS: tl.constexpr, MOMENTS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        program = tl.program_id(0)
        slot = moments + (program % SLOTS) * MOMENTS
        if program < of_output:
            _add_moments(output, slot, program, count, OUTPUT_STEPS, BLOCK)
        elif PLANES:
            _add_planes(
                inputs, importance, slot, program - of_output, rows, columns, channels,
                WIDTH, INPUT_STEPS, BLOCK,
            )  # fmt: skip
        else:
            _add_columns(
                inputs, importance, slot, program - of_output, rows, columns,
                WIDTH, INPUT_STEPS, BLOCK,
            )  # fmt: skip
