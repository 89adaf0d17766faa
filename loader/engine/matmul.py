"""Matrix products in FP8, for cards that have them: faster than in 16 bit, and less exact.

They are off unless the user turns them on. A Linear's input is scaled by the largest magnitude
that was recorded of it; larger values are clipped. torch has no FP8 product for Conv2d.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ...quant import INT8, NumberFormat, Plan
from ...quant.fp8 import quantize_input
from ..files.layer_formats import input_scale
from . import int8_matmul
from .int8_matmul import multiplied_in_int8

_DTYPES = (torch.float16, torch.bfloat16)  # cuBLAS adds no bias to FP32 outputs
_SIDES = 16  # cuBLAS wants the sides of both matrices to be multiples of this


def multiplied(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return a Linear's output by a product in FP8 or INT8; None if the ordinary one is needed.

    The arguments are those of multiplied_in_fp8.
    """
    if not isinstance(weight, QuantizedTensor):
        return None
    if weight._qdata.dtype is torch.int8:
        return multiplied_in_int8(inputs, weight, bias)
    return multiplied_in_fp8(inputs, weight, bias)


def multiplied_in_fp8(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return a Linear's output by a product in FP8; None if the ordinary product is needed.

    Args:
        inputs: (..., in features); a QuantizedTensor is in FP8 already.
        weight: (out, in) of a Linear; a QuantizedTensor with an input_scale multiplies in FP8.
        bias: (out,) in the inputs' dtype.
    """
    if not isinstance(weight, QuantizedTensor):
        return None
    scale = weight._params.input_scale
    if scale is None or inputs.dtype not in _DTYPES or not inputs.numel():
        return None
    if inputs.requires_grad or (bias is not None and bias.requires_grad):
        return None  # training: rounding has no derivative
    if isinstance(inputs, QuantizedTensor):
        rows, scale = inputs._qdata.flatten(0, -2), inputs._params.scale
    else:
        rows = quantize_input(inputs.reshape(-1, inputs.shape[-1]).contiguous(), scale)
    # Fast accumulation keeps about 14 bits, which is enough: the inputs have 4.
    outputs = torch._scaled_mm(
        rows, weight._qdata.t(), scale_a=scale, scale_b=weight._params.scale,
        bias=bias, out_dtype=inputs.dtype, use_fast_accum=True,
    )  # fmt: skip
    return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


def scale_at_hand(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor | None:
    """Return a layer's input_scale if its input may be handed over in FP8, else None.

    It may not if the weight has a function on it, or must be cast or fetched first: then the
    layer's ordinary product needs a 16-bit input.

    Args:
        layer: Linear without hooks.
        inputs: any tensor with the device and dtype of the layer's input.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, QuantizedTensor) or layer.weight_function:
        return None
    at_hand = (weight.device, weight.dtype) == (inputs.device, inputs.dtype)
    return weight._params.input_scale if at_hand and inputs.dtype in _DTYPES else None


def multiply_in_fp8(patcher: ModelPatcher, plan: Plan) -> None:
    """Let a model's quantized Linear layers multiply in FP8 if the device can.

    Args:
        patcher: MODEL whose weights are QuantizedTensors with our layout.
        plan: of that model; a layer without an input_amax keeps the ordinary product.
    """
    if not usable(patcher.load_device):
        return
    for layer in plan.quantized:
        weight = patcher.model.diffusion_model.get_submodule(layer).weight
        if fits(weight):
            scale_input(weight, plan.input_amax(layer))


def fits(weight: QuantizedTensor) -> bool:
    """Whether a weight can multiply in FP8: it is an FP8 Linear's, and cuBLAS takes its sides."""
    if weight._qdata.dtype is not torch.float8_e4m3fn:
        return False
    return weight.ndim == 2 and not any(size % _SIDES for size in weight.shape)


def scale_input(weight: QuantizedTensor, amax: float | None) -> None:
    """Let a weight multiply in FP8, with inputs clipped at `amax`; None changes nothing."""
    scale = input_scale(amax)
    if scale is not None:
        with torch.inference_mode(False):  # so that it can also be used outside of that mode
            scale = scale.clone().to(weight._qdata.device)
        weight._params = dataclasses.replace(weight._params, input_scale=scale)


def products(patcher: ModelPatcher, number_format: NumberFormat) -> str:
    """Return a line that says how many layers of a MODEL multiply in a format, or why none does."""
    return (int8_matmul.description if number_format is INT8 else description)(patcher)


def description(patcher: ModelPatcher) -> str:
    """Return a line that says how many layers of a MODEL multiply in FP8, or why none does."""
    if not usable(patcher.load_device):
        return f"{patcher.load_device} has no FP8 matrix products"
    weights = patcher.model.diffusion_model.parameters()
    params = [weight.params for weight in weights if isinstance(weight, QuantizedTensor)]
    return f"{sum(param.input_scale is not None for param in params)} multiply in FP8"


def usable(device: torch.device) -> bool:
    """Whether a device multiplies in FP8. The first call for a device tries one product."""
    return memory.supports_fp8_compute(device) and _works(device)


@functools.cache
def _works(device: torch.device) -> bool:
    ones = torch.ones(16, 16, device=device)
    try:
        scale = ones[0, 0]
        rows = quantize_input(ones, scale)
        found = torch._scaled_mm(
            rows, rows.t(), scale_a=scale, scale_b=scale, out_dtype=torch.float16,
            use_fast_accum=True,
        )  # fmt: skip
        return bool((found == 16).all())
    except Exception as error:  # Triton, cuBLAS and older torch raise many kinds; FP8 is optional
        logging.info(
            "HSWQ: no FP8 matrix products on %s (%s)", device, str(error).split("\n", 1)[0]
        )
        return False
