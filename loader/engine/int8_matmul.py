"""Matrix products in INT8: on many cards quicker than in 16 bit, and less exact.

They are off unless the user turns them on. Each row of a Linear's input is rounded to INT8 with a
scale of its own, in each call. comfy_kitchen computes them, by the kernel that its table of
capabilities has for the device: cuBLAS, Triton, HIP or plain torch. There is none for Conv2d.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import comfy_kitchen
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ...quant import Plan

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def multiplied_in_int8(
    inputs: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return a Linear's output by a product in INT8; None if the ordinary product is needed.

    Args:
        inputs: (..., in features).
        weight: int8 (out, in) of a Linear, whose params say whether it `multiplies`.
        bias: (out,) in the inputs' dtype.
    """
    if not weight._params.multiplies or inputs.dtype not in _DTYPES or not inputs.numel():
        return None
    if inputs.requires_grad or (bias is not None and bias.requires_grad):
        return None  # training: rounding has no derivative
    rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    product = _compiled_product if torch.compiler.is_compiling() else _product
    outputs = product(rows, weight._qdata, weight._params.scale, bias)
    return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


def _product(
    rows: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return comfy_kitchen.int8_linear(rows, data, scale, bias, out_dtype=rows.dtype)


_compiled_product = torch.library.custom_op("hswq::int8_linear", _product, mutates_args=())
"""The same as one step of a compiled graph: a compiler cannot trace comfy_kitchen's choice."""


@_compiled_product.register_fake
def _(
    rows: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return rows.new_empty(len(rows), len(data))


def multiplies_here(layer: torch.nn.Module, inputs: torch.Tensor) -> bool:
    """Whether a layer's own weight can be multiplied in INT8 although others would be cast.

    An INT8 product takes inputs of any dtype. But a weight with a function on it has to be decoded,
    and one on another device has to be copied first.
    """
    weight = layer.weight
    if layer.weight_function or not isinstance(weight, QuantizedTensor):
        return False
    multiplies = getattr(weight._params, "multiplies", False)
    return multiplies and weight.device == inputs.device and not inputs.requires_grad


def multiply_in_int8(patcher: ModelPatcher, plan: Plan) -> None:
    """Let a model's INT8 Linear layers multiply in INT8, if its device can.

    Args:
        patcher: MODEL whose weights are QuantizedTensors with our layout.
        plan: of that model.
    """
    if not usable(patcher.load_device):
        return
    for layer in plan.quantized:
        weight = patcher.model.diffusion_model.get_submodule(layer).weight
        if weight.ndim == 2 and weight._qdata.dtype is torch.int8:
            weight._params = dataclasses.replace(weight._params, multiplies=True)


def description(patcher: ModelPatcher) -> str:
    """Return a line that says how many layers of a MODEL multiply in INT8, or why none does."""
    if not usable(patcher.load_device):
        return f"{patcher.load_device} has no INT8 matrix products"
    weights = patcher.model.diffusion_model.parameters()
    params = [weight.params for weight in weights if isinstance(weight, QuantizedTensor)]
    return f"{sum(getattr(param, 'multiplies', False) for param in params)} multiply in INT8"


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether a device multiplies in INT8; the first call tries it."""
    rows = torch.ones(32, 32, device=device)
    weight, scale = torch.ones(32, 32, dtype=torch.int8, device=device), rows[:, :1]
    try:
        found = comfy_kitchen.int8_linear(rows, weight, scale, None, out_dtype=torch.float16)
        return bool(((found - 32).abs() < 0.1).all())
    except Exception as error:  # cuBLAS's and Triton's own, or an older comfy_kitchen
        logging.info(
            "HSWQ: no INT8 matrix products on %s (%s)", device, str(error).split("\n", 1)[0]
        )
        return False
