"""How far a quantized model's layers are from the 16-bit model's, each on its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import parts
from hswq.calibration import monitored_layers
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


def unet_bytes(patcher: ModelPatcher) -> int:
    """Return what the diffusion model's weights take, scales and all."""
    parameters = patcher.model.diffusion_model.parameters()
    return sum(part.nbytes for parameter in parameters for part in parts(parameter))


def share_kept(reference: ModelPatcher, kept: Collection[str]) -> float:
    """Return what kept layers add to the bytes of all layers in FP8, as a share of those."""
    layers = monitored_layers(reference.model.diffusion_model)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    return sum(sizes[name] for name in kept) / sum(sizes.values())
