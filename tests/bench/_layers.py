"""How far a quantized model's layers are from the 16-bit model's, each on its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import parts, weight
from hswq.calibration import Statistics, monitored_layers
from torch import Tensor


def layer_errors(
    reference: ModelPatcher, patcher: ModelPatcher, sample: Callable[[], object]
) -> dict[str, float]:
    """Return each layer's relative output error, |found - expected| / |expected|.

    Both models' layers get the inputs that the 16-bit model's have while it samples, so no
    layer's error goes into another's.
    """
    comfy.model_management.load_models_gpu([reference, patcher])
    theirs = monitored_layers(patcher.model.diffusion_model)
    sums: dict[str, Tensor] = {}

    def measure(name: str, _: torch.nn.Module, inputs: tuple, expected: Tensor) -> None:
        found = theirs[name](*inputs)
        pair = torch.stack([(found - expected).float().norm(), expected.float().norm()])
        sums[name] = sums.get(name, 0) + pair.double().square()

    layers = monitored_layers(reference.model.diffusion_model)
    hooks = [
        layer.register_forward_hook(functools.partial(measure, name))
        for name, layer in layers.items()
    ]
    try:
        sample()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: math.sqrt(error / power) for name, (error, power) in sums.items()}


def weighted_error(reference: ModelPatcher, patcher: ModelPatcher, measured: Statistics) -> float:
    """Return the mean over all layers of HSWQ's weighted MSE, relative to the weighted square.

    Of the weights themselves instead of their histogram: importance of input channels times the
    square of what quantization changes. Layers in 16 bit count as 0.
    """
    errors, device = [], comfy.model_management.get_torch_device()
    for name, layer in measured.items():
        expected, found = (weight(one, name).to(device).double() for one in (reference, patcher))
        importance = layer.importance.to(device).reshape(1, -1, *[1] * (expected.ndim - 2))
        error, power = (
            (importance * one.square()).sum().item() for one in (found - expected, expected)
        )
        errors.append(error / power)
    return sum(errors) / len(errors)


def unet_bytes(patcher: ModelPatcher) -> int:
    """Return what the diffusion model's weights take, scales and all."""
    parameters = patcher.model.diffusion_model.parameters()
    return sum(part.nbytes for parameter in parameters for part in parts(parameter))
