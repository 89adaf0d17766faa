"""Triton kernels for a forward. Plain torch gives the same results in more launches.

They are used if Triton is installed and the weights are on an NVIDIA GPU. Bytes are decoded with
integer operations, so that cards without FP8 hardware (before Ada) can dequantize with them too.
"""

from __future__ import annotations

import functools
import logging
import operator

import torch

from .launching import launch, tl, triton

_BLOCK = 4096
_GATED = 512  # channels in a program of _gated_input
_VECTOR = 16  # weights that share a row in _dequantize_rows


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether the kernels run on a device. The first call for a GPU tries two of them."""
    if triton is None or device.type != "cuda" or torch.version.hip is not None:
        return False
    try:
        ones, gated = tried(device)
        return bool((ones == 1.0).all()) and bool(((gated - 0.8413).abs() < 0.001).all())
    except Exception as error:  # e.g. no compiler, or an unknown card; then torch is used
        logging.info("HSWQ: Triton is not usable on %s (%s)", device, str(error).split("\n", 1)[0])
        return False


def tried(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Run two kernels, and return their results: all 1, and all GEGLU of 1."""
    # As many values as a layer may have, for which Triton compiles no other variant.
    data = torch.full((16,), 0x38, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    ones = torch.ones(1, 32, dtype=torch.float16, device=device)
    return dequantize(data, torch.ones((), device=device), torch.float16), gated_input(ones, None)


def dequantize(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `quantized * scale` in `dtype`, in one launch (see fp8.dequantize).

    Args:
        quantized: contiguous (or channels-last) float8_e4m3fn on a GPU.
        scale: FP32 scalar tensor there.
        dtype: of the result, which has the memory format of `quantized`.
    """
    out = torch.empty_like(quantized, dtype=dtype)
    _launch(_dequantize, quantized, scale, out)
    return out


def dequantize_rows(
    quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return `quantized * scale` in `dtype`, in one launch (see int8.dequantize).

    Args:
        quantized: int8 (out, in, ...) on a GPU, contiguous (or channels-last).
        scale: FP32 there, one number for each output row.
        dtype: of the result, which has the memory format of `quantized`.
    """
    out = torch.empty_like(quantized, dtype=dtype)
    size = quantized.numel() // max(1, len(quantized))
    _launch(_dequantize_rows if size % _VECTOR == 0 else _dequantize_odd_rows,
            quantized, scale, out, size)  # fmt: skip
    return out


def quantize_input(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `values / scale` as float8_e4m3fn, in one launch (see fp8.quantize_input).

    Args:
        values: contiguous FP16, BF16 or FP32 on a GPU that has FP8 (from Ada on).
        scale: FP32 scalar tensor there.
    """
    out = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    _launch(_quantize_input, values, scale, out)
    return out


def gated_input(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return GEGLU of `values`, in one launch (see fp8.gated_input).

    Args:
        values: contiguous (rows, 2 * channels) FP16, BF16 or FP32 on a GPU.
        scale: FP32 scalar tensor there, for float8_e4m3fn on a GPU that has it (from Ada on).
    """
    rows, channels = len(values), values.shape[1] // 2
    dtype = values.dtype if scale is None else torch.float8_e4m3fn
    out = torch.empty(rows, channels, dtype=dtype, device=values.device)
    launch(
        _gated_input, (rows, triton.cdiv(channels, _GATED)), values, scale, out, channels,
        BLOCK=_GATED, num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _launch(
    kernel: object, source: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, *sizes: int
) -> None:
    """Run a kernel over all elements; all tensors are on one device.

    This runs for every layer in every step. Triton's search for the compiled kernel would take the
    CPU longer than everything else. Triton would also ask each tensor for its address, and CUDA
    about that. So it is given addresses, which it does not check.
    """
    if out.is_cuda and out.get_device() != torch.cuda.current_device():  # where Triton launches
        with torch.cuda.device_of(out):
            return _launch(kernel, source, scale, out, *sizes)
    tensors, numbers = (source, scale, out), (out.numel(), *sizes)
    addresses = source.data_ptr(), scale.data_ptr(), out.data_ptr()
    programs = (numbers[0] + _BLOCK - 1) // _BLOCK
    compiled = _compiled_for(kernel, tensors, addresses, numbers)
    if compiled is not None:
        compiled[(programs, 1, 1)](*addresses, *numbers, _BLOCK)
    else:
        _run(kernel, programs, tensors, numbers)
    return None


_Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_compiled: dict[tuple, object] = {}


def _run(kernel: object, programs: int, tensors: _Tensors, numbers: tuple[int, ...]) -> object:
    source, *others = tensors
    if source.dtype is torch.float8_e4m3fn:  # which Triton refuses before Ada
        source = source.view(torch.uint8)
    how = {"BLOCK": _BLOCK, "num_warps": 8, "enable_fp_fusion": False}
    return launch(kernel, (programs,), source, *others, *numbers, **how)


def _compiled_for(
    kernel: object, tensors: _Tensors, addresses: tuple[int, ...], numbers: tuple[int, ...]
) -> object | None:
    """Return the kernel compiled for such arguments; None to let Triton find it.

    Sizes and addresses that are multiples of 16 share a kernel.
    """
    bits = functools.reduce(operator.or_, numbers, addresses[0] | addresses[1] | addresses[2])
    if bits % 16 or numbers[0] >= 1 << 31:
        return None
    source, _, out = tensors
    # The dtypes identify the kernel. Its hash takes microseconds, so it is not in the key.
    key = out.device.index, source.dtype, out.dtype
    if key not in _compiled:
        compiled = _run(kernel, 1, tensors, numbers)
        try:
            compiled[(1, 1, 1)](*addresses, *numbers, _BLOCK)
        except TypeError:  # this version of Triton calls compiled kernels in another way
            compiled = None
        _compiled[key] = compiled
    return _compiled[key]


if triton is not None:

    @triton.jit
    def _dequantize(quantized, scale, out, count, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        byte = tl.load(quantized + at, mask=at < count, other=0, eviction_policy="evict_first")
        byte = byte.to(tl.uint16)
        # Sign, exponent and mantissa moved to their places in FP16 give the value over 2^8.
        bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * (tl.load(scale) * 256.0)
        value = tl.where((byte & 0x7F) == 0x7F, float("nan"), value)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)

    @triton.jit
    def _dequantize_rows(quantized, scale, out, count, size, BLOCK: tl.constexpr):  # noqa: N803
        # Rows are of whole vectors, so that only one division is needed for each.
        first = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK // 16) * 16
        at = first[:, None] + tl.arange(0, 16)[None, :]
        row_scale = tl.load(scale + first // size, mask=first < count, other=0.0)
        value = tl.load(quantized + at, mask=at < count, other=0, eviction_policy="evict_first")
        value = value.to(tl.float32) * row_scale[:, None]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)

    @triton.jit
    def _dequantize_odd_rows(quantized, scale, out, count, size, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        row_scale = tl.load(scale + at // size, mask=at < count, other=0.0)
        value = tl.load(quantized + at, mask=at < count, other=0).to(tl.float32) * row_scale
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)

    @triton.jit
    def _quantize_input(values, scale, out, count, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values + at, mask=at < count, other=0.0).to(tl.float32)
        _store_input(value, scale, out + at, at < count)

    @triton.jit
    def _store_input(value, scale, out, inside):
        value *= tl.div_rn(1.0, tl.load(scale))
        value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))  # or nan
        tl.store(out, value.to(tl.float8e4nv), mask=inside)

    @triton.jit
    def _gated_input(values, scale, out, channels, BLOCK: tl.constexpr):  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < channels
        value = tl.load(values + row * 2 * channels + at, mask=inside, other=0.0)
        gate = tl.load(values + (row * 2 + 1) * channels + at, mask=inside, other=0.0)
        wide = gate.to(tl.float32)
        wide = wide * 0.5 * (1.0 + tl.erf(wide * 0.7071067811865476))  # 1 / sqrt(2)
        # torch rounds the result of gelu as well as that of the product.
        gated = value.to(tl.float32) * wide.to(gate.dtype).to(tl.float32)
        gated = gated.to(gate.dtype)
        place = out + row * channels + at
        if scale is None:
            tl.store(place, gated, mask=inside)
        else:
            _store_input(gated.to(tl.float32), scale, place, inside)
