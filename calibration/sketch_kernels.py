"""A Triton kernel that adds a call's rows to a sketch in one launch; torch needs thirty.

Each program holds some channels of the sketch in registers. It computes the picked rows and their
signs as `noise` does, and adds their product with the tensor cores.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

from . import noise
from .kernels import tl, triton
from .kernels import usable as kernels_usable

_CHANNELS = 32  # channels of the sketch in a program
_ROWS = 64  # rows that a program adds at a time
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Rows(NamedTuple):
    """The layout of an input's channel vectors in memory. Steps are in values.

    Attributes:
        count: number of vectors. Vector i begins at
            (i // inner) * outer_step + (i % inner) * inner_step.
        inner: number of positions in an image, or of tokens in a text.
        outer_step: from one image or text to the next.
        inner_step: from one position or token to the next.
        channel_step: from one channel to the next.
    """

    count: int
    inner: int
    outer_step: int
    inner_step: int
    channel_step: int


def rows_of(inputs: torch.Tensor) -> Rows | None:
    """Return an input's layout in memory; None if the kernel does not know it."""
    if inputs.dtype not in _DTYPES or inputs.ndim not in (2, 3, 4) or not inputs.numel():
        return None
    shape, step = inputs.shape, inputs.stride()
    if inputs.ndim == 2:
        return Rows(shape[0], 1, step[0], 0, step[1])
    if inputs.ndim == 3:
        return Rows(shape[0] * shape[1], shape[1], step[0], step[1], step[2])
    if shape[2] > 1 and step[2] != shape[3] * step[3]:
        return None
    inner = shape[2] * shape[3]
    return Rows(shape[0] * inner, inner, step[0], step[3], step[1])


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether the kernel runs on a device. The first call for a GPU tries it."""
    if not kernels_usable(device):
        return False
    try:
        one = torch.ones(1, 16, dtype=torch.float16, device=device)
        matrix = torch.zeros(128, 16, dtype=torch.bfloat16, device=device)
        add_rows(matrix, one, rows_of(one), 1, 0)
        expected = noise.signs(0, 1, 128, device).expand(-1, 16)
        return torch.equal(matrix.float(), expected)
    except Exception as error:  # whatever it is, torch is used instead
        reason = str(error).split("\n", 1)[0]
        logging.info("HSWQ: the sketches' kernel is not usable on %s (%s)", device, reason)
        return False


@functools.cache
def lacks_products(device: torch.device) -> bool:
    """Whether Triton does not use the tensor cores of a device: for cards before RTX 30.

    There, products of FP16 numbers need more registers than there are, those of FP32 do not.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def add_rows(matrix: torch.Tensor, inputs: torch.Tensor, rows: Rows, count: int, seed: int) -> None:
    """Add `count` of an input's rows, each times random signs, to a sketch in one launch.

    Args:
        matrix: (SIZE, C) BF16 or FP32 on the GPU, contiguous; SIZE is a power of 2 from 32.
        inputs: FP16, BF16 or FP32 on that GPU.
        rows: rows_of(inputs).
        count: number of rows to add; see noise.picks.
        seed: 32 bits.
    """
    size, channels = matrix.shape
    # Triton would take integers from 2**31 as 64 bits, and compile another variant for them.
    seed = seed - (1 << 32) if seed >> 31 else seed
    with torch.cuda.device_of(matrix):  # Triton launches on the current device
        _add_rows[(triton.cdiv(channels, _CHANNELS),)](
            matrix, inputs, *rows, channels, count, seed,
            SIZE=size, WORDS=size // 32, CHANNELS=_CHANNELS, ROWS=_ROWS,
            STEPS=triton.next_power_of_2(triton.cdiv(count, _ROWS)),
            IN_FP32=lacks_products(matrix.device), num_warps=4,
        )  # fmt: skip


if triton is not None:
    # Triton compiles one variant for each kind of value of an argument. Only the step between
    # channels matters: if it is 1, loads are wider.
    _SIZES = ("rows", "inner", "outer_step", "inner_step", "count", "seed")
    _FIRST, _SECOND = tl.constexpr(noise.FIRST), tl.constexpr(noise.SECOND)

    @triton.jit
    def _mixed(value):
        value = value ^ (value >> 16)
        value = value * tl.full((), _FIRST, tl.uint32)
        value = value ^ (value >> 15)
        value = value * tl.full((), _SECOND, tl.uint32)
        return value ^ (value >> 16)

    @triton.jit
    def _words(seed, row, word):
        return _mixed(_mixed((row * 256 + word).to(tl.uint32)) ^ seed)

    @triton.jit
    def _signs(
        seed, row, SIZE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        words = _words(seed, row[None, :], 1 + tl.arange(0, WORDS)[:, None])
        bits = (words[:, None, :] >> tl.arange(0, 32).to(tl.uint32)[None, :, None]) & 1
        return 1 - 2 * tl.reshape(bits.to(tl.int32), (SIZE, ROWS))

    @triton.jit(do_not_specialize=_SIZES)
    def _add_rows(
        matrix, inputs, rows, inner, outer_step, inner_step, channel_step, channels, count, seed,
        SIZE: tl.constexpr, WORDS: tl.constexpr,  # noqa: N803
        CHANNELS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,  # noqa: N803
        IN_FP32: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        seed = seed.to(tl.uint32, bitcast=True)
        channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        total = tl.zeros((SIZE, CHANNELS), dtype=tl.float32)
        for start in tl.range(0, STEPS * ROWS, ROWS):
            row = start + tl.arange(0, ROWS)
            chance = (_words(seed, row, 0) >> 8).to(tl.int64)
            place = (row.to(tl.int64) * rows + ((chance * rows) >> 24)) // count
            begin = (place // inner) * outer_step + (place % inner) * inner_step
            at = begin[:, None] + channel.to(tl.int64)[None, :] * channel_step
            inside = (row < count)[:, None] & (channel < channels)[None, :]
            value = tl.load(inputs + at, mask=inside, other=0.0)
            if IN_FP32:
                value = value.to(tl.float32)
            signs = _signs(seed, row, SIZE, WORDS, ROWS).to(value.dtype)
            total = tl.dot(signs, value, total, input_precision="tf32")
        sums = matrix + tl.arange(0, SIZE)[:, None] * channels + channel[None, :]
        present = (channel < channels)[None, :]
        before = tl.load(sums, mask=present, other=0.0).to(tl.float32)
        tl.store(sums, (before + total).to(matrix.dtype.element_ty), mask=present)
