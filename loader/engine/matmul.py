"""Matrix products in FP8, for cards that have them: quicker than in 16 bit, and less exact.

Off unless a user chooses them. A Linear's input is scaled by the largest that was recorded of it;
what is larger is clipped. Conv2d has no FP8 product in torch.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ...quant import Plan
from ...quant.fp8 import quantize_input
from ..files.layer_formats import input_scale

_DTYPES = (torch.float16, torch.bfloat16)  # cuBLAS adds no bias to FP32 outputs
_SIDES = 16  # that the matrices' sides must be multiples of


def multiplied_in_fp8(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return a Linear's output by a product in FP8, None where it is to be the ordinary one.

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
    # Fast accumulation keeps some 14 bits, of inputs that have 4.
    outputs = torch._scaled_mm(
        rows, weight._qdata.t(), scale_a=scale, scale_b=weight._params.scale,
        bias=bias, out_dtype=inputs.dtype, use_fast_accum=True,
    )  # fmt: skip
    return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


def scale_at_hand(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor | None:
    """Return a layer's input_scale if nobody but the product reads its input, and that in FP8.

    Args:
        layer: Linear that nobody has hooked; with a function on its weight, or with a weight that
            has to be cast or fetched, it takes ordinary inputs.
        inputs: of the device and dtype of the input.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, QuantizedTensor) or layer.weight_function:
        return None
    at_hand = (weight.device, weight.dtype) == (inputs.device, inputs.dtype)
    return weight._params.input_scale if at_hand and inputs.dtype in _DTYPES else None


def multiply_in_fp8(patcher: ModelPatcher, plan: Plan) -> None:
    """Let a model's quantized Linear layers multiply in FP8, where that is possible.

    Args:
        patcher: MODEL whose weights are QuantizedTensors with our layout.
        plan: of that model; a layer without an input_amax stays with the ordinary product.
    """
    if not usable(patcher.load_device):
        return
    for layer in plan.quantized:
        weight = patcher.model.diffusion_model.get_submodule(layer).weight
        if fits(weight):
            scale_input(weight, plan.input_amax(layer))


def fits(weight: QuantizedTensor) -> bool:
    """Whether a weight can multiply in FP8: a Linear's, with sides that cuBLAS takes."""
    return weight.ndim == 2 and not any(size % _SIDES for size in weight.shape)


def scale_input(weight: QuantizedTensor, amax: float | None) -> None:
    """Let a weight multiply in FP8 inputs up to `amax`; one that is not known changes nothing."""
    scale = input_scale(amax)
    if scale is not None:
        with torch.inference_mode(False):  # so that it may be used anywhere
            scale = scale.clone().to(weight._qdata.device)
        weight._params = dataclasses.replace(weight._params, input_scale=scale)


def description(patcher: ModelPatcher) -> str:
    """Return a line about what multiplies in FP8 in a MODEL that was asked to."""
    if not usable(patcher.load_device):
        return f"{patcher.load_device} has no FP8 matrix products"
    weights = patcher.model.diffusion_model.parameters()
    params = [weight.params for weight in weights if isinstance(weight, QuantizedTensor)]
    return f"{sum(param.input_scale is not None for param in params)} multiply in FP8"


def usable(device: torch.device) -> bool:
    """Whether a device multiplies in FP8; the first call on one that should tries it."""
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
    except Exception as error:  # Triton's and cuBLAS's own, an older torch: without, all works too
        logging.info(
            "HSWQ: no FP8 matrix products on %s (%s)", device, str(error).split("\n", 1)[0]
        )
        return False
