"""The e4m3fn number format: rounding in the search, and the stored tensors."""

from __future__ import annotations

import functools

import torch

from . import kernels
from .storing import Storing

FP8_MAX = 448.0
"""Largest finite value of float8_e4m3fn."""

_SMALLEST_NORMAL = 2.0**-6
_SUBNORMAL_STEP = 2.0**-9
_PIECE = 1 << 18  # weights that a thread does at a time: as many as its cache holds
_DROPPED_BITS = 20  # FP32 keeps 23 mantissa bits, e4m3fn keeps 3


def positive_grid(device: torch.device) -> torch.Tensor:
    """Return the 127 values of e4m3fn from 0 to 448: (127,) FP32."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    return values.to(device)


def quotient(numerator: torch.Tensor | float, denominator: torch.Tensor | float) -> torch.Tensor:
    """Return the correctly rounded quotient of a tensor and a number, the same on every device.

    Torch computes number / tensor as a product with the reciprocal, and on CUDA tensor / number
    too. That rounds twice, and the results here must be exact.
    """
    if not isinstance(numerator, torch.Tensor):
        return torch.full_like(denominator, numerator) / denominator
    return numerator / torch.full_like(numerator, denominator)


def round_to_grid(magnitude: torch.Tensor) -> torch.Tensor:
    """Round FP32 magnitudes in [0, 448] to the nearest e4m3fn value, ties downwards.

    A value exactly between two grid values goes to the smaller one, as HSWQ's search has it. A
    torch cast goes to the even one. Any shape; returns FP32 of the same shape.
    """
    just_under_half = (1 << (_DROPPED_BITS - 1)) - 1
    bits = (magnitude.view(torch.int32) + just_under_half) >> _DROPPED_BITS << _DROPPED_BITS
    subnormal = torch.ceil(magnitude / _SUBNORMAL_STEP - 0.5) * _SUBNORMAL_STEP
    return torch.where(magnitude < _SMALLEST_NORMAL, subnormal, bits.view(torch.float32))


def scalar(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a number as an FP32 scalar tensor. A GPU gets it without making the CPU wait."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)


def storing_of(weight: torch.Tensor, amax: float | torch.Tensor, *, scaled: bool) -> Storing:
    """Return how `quantize` stores a weight. The arguments are the same."""
    # The original computes FP16 weights in FP16. So do we, to store the same bytes.
    dtype = torch.float16 if weight.dtype is torch.float16 else torch.float32
    amax = scalar(amax, weight.device)
    if scaled:
        return Storing(quotient(FP8_MAX, amax), FP8_MAX, quotient(amax, FP8_MAX), dtype)
    bound = amax.clamp(max=FP8_MAX).to(dtype)
    bound = float(bound) if weight.device.type == "cpu" else bound
    return Storing(None, bound, torch.ones_like(amax), dtype)


def quantize(
    weight: torch.Tensor, amax: float | torch.Tensor, *, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip a weight at amax and store it as FP8.

    Args:
        weight: any floating dtype and shape.
        amax: clipping magnitude in the weight's units, above 0.
        scaled: True stores `weight * 448 / amax` (V2), False stores the clipped weight (V1).

    Returns:
        The float8_e4m3fn tensor in the weight's shape and on its device, and its weight_scale:
        an FP32 scalar tensor on the same device, 1 for V1, `amax / 448` for V2.
    """
    storing = storing_of(weight, amax, scaled=scaled)
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return _cast_to_fp8(storing.clipped(storing.scaled(weight))), storing.scale
    return _in_pieces(weight.detach(), storing), storing.scale


def _in_pieces(weight: torch.Tensor, storing: Storing) -> torch.Tensor:
    """Return a weight on the CPU as FP8. In pieces it is four times as fast as at once."""
    stored = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    piece = _PIECE * torch.get_num_threads()
    pieces = zip(weight.view(-1).split(piece), stored.view(-1).split(piece), strict=True)
    for source, target in pieces:
        target.copy_(storing.castable(storing.scaled(source)))
    return stored


def dequantize(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `quantized * scale` in `dtype`, multiplied in FP32 so that FP16 cannot overflow.

    Args:
        quantized: float8_e4m3fn tensor of any shape.
        scale: FP32 scalar tensor (weight_scale).
        dtype: of the result.
    """
    device = quantized.device
    if not torch.compiler.is_compiling():  # these questions would break a compiler's graph
        if kernels.usable(device):
            return kernels.dequantize(quantized, scale, dtype)
        if not device_casts_fp8(device.type):
            return dequantize(quantized.cpu(), scale.cpu(), dtype).to(device)
    elif is_compiled_without_fp8():
        return _dequantize_uncompiled(quantized, scale, dtype)
    return (quantized.to(torch.float32) * scale).to(dtype)


@torch.compiler.assume_constant_result
def compilers_lack_fp8() -> bool:
    """Whether a GPU of this machine is from before Ada.

    For those, Triton refuses every kernel with a float8 argument, even if it only reads the bytes
    as integers. torch.compile makes such kernels.
    """
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    devices = range(torch.cuda.device_count())
    return any(torch.cuda.get_device_capability(device) < (8, 9) for device in devices)


def is_compiled_without_fp8() -> bool:
    """Whether a graph is being compiled in which only the inputs may be float8 tensors."""
    return torch.compiler.is_compiling() and compilers_lack_fp8()


@torch.library.custom_op("hswq::dequantize", mutates_args=())
def _dequantize_uncompiled(
    quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Do what dequantize does, as one step of a compiled graph that is not compiled itself."""
    return dequantize(quantized, scale, dtype)


@_dequantize_uncompiled.register_fake
def _(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(quantized, dtype=dtype)


def quantize_input(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a layer's input as float8_e4m3fn for products in FP8, clipped where it is too large.

    Args:
        values: contiguous FP16, BF16 or FP32, of any shape.
        scale: FP32 scalar tensor (input_scale), the largest |x| over 448.
    """
    if not torch.compiler.is_compiling() and kernels.usable(values.device):
        return kernels.quantize_input(values, scale)
    quantized = values.to(torch.float32) * scale.reciprocal()
    return quantized.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def gated_input(values: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return GEGLU of a projection: the input of the layer after it.

    On a GPU this is one launch. Torch takes two, and stores and loads the values between them. A
    compiler fuses torch's own operations, so compiled code does not need this.

    Args:
        values: contiguous (rows, 2 * channels) FP16, BF16 or FP32: the values, then their gates.
        scale: FP32 scalar tensor (input_scale) for a product in FP8, see quantize_input.

    Returns:
        (rows, channels), as float8_e4m3fn if there is a scale, else in the dtype of `values`.
    """
    if kernels.usable(values.device):
        return kernels.gated_input(values, scale)
    gated, gates = values.chunk(2, -1)
    gated = gated * torch.nn.functional.gelu(gates)
    return gated if scale is None else quantize_input(gated, scale)


@functools.cache
def device_casts_fp8(device_type: str) -> bool:
    """Whether this kind of torch device can cast to and from float8_e4m3fn."""
    try:
        one = torch.ones(1, device=device_type)
        return one.to(torch.float8_e4m3fn).to(torch.float32).item() == 1.0
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def _cast_to_fp8(values: torch.Tensor) -> torch.Tensor:
    if device_casts_fp8(values.device.type):
        return values.to(torch.float8_e4m3fn)
    # Such a device (MPS) can store the bytes; only the cast is missing.
    return (
        values.cpu()
        .to(torch.float8_e4m3fn)
        .view(torch.uint8)
        .to(values.device)
        .view(torch.float8_e4m3fn)
    )
