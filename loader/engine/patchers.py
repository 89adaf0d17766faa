"""Questions about a ModelPatcher: whether it is quantized, what patches it, what is measurable."""

from __future__ import annotations

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ...calibration import monitored_layers
from .identity import is_narrow
from .network import BYPASS_LORA, own_layers


def is_quantized(patcher: ModelPatcher) -> bool:
    """Whether any Linear or Conv2d of a MODEL holds fewer than 16 bits a weight."""
    weights = (getattr(layer, "weight", None) for layer in own_layers(patcher).values())
    return any(weight is not None and is_narrow(weight) for weight in weights)


def unknown_layers(patcher: ModelPatcher) -> str | None:
    """Return why our loaders could not quantize all measurable layers of a MODEL, else None.

    They replace ComfyUI's own Linear and Conv2d. Layers of other classes stay 16 bit, so that
    statistics of them would be useless.
    """
    model, layers = type(patcher.model).__name__, own_layers(patcher)
    foreign = [
        n for n, layer in layers.items() if not isinstance(layer, comfy.ops.CastWeightBiasOp)
    ]
    if foreign:
        return f"{len(foreign)} layers of {model}, such as {foreign[0]}, are not made by ComfyUI"
    return None if layers else f"{model} has no Linear or Conv2d layers"


def takes_another_model(patcher: ModelPatcher) -> bool:
    """Whether a hook in the conditioning puts another model's weights in place of a MODEL's."""
    return any(
        isinstance(patch[1], tuple) and patch[1][0] == "model_as_lora"
        for by_key in patcher.hook_patches.values()
        for patches in by_key.values()
        for patch in patches
    )


def with_clones(patcher: ModelPatcher) -> list[ModelPatcher]:
    """Return a MODEL and those clones of it that sample the same images on other GPUs."""
    return [patcher, *patcher.get_additional_models_with_key("multigpu")]


def patches(patcher: ModelPatcher) -> str | None:
    """Return a note about LoRAs and other patches on a MODEL; None if it has none."""
    patched = set(patcher.patches).union(*patcher.hook_patches.values())
    notes = [f"patches on {len(patched)} weights"] if patched else []
    notes += ["LoRAs beside the weights"] if patcher.injections.get(BYPASS_LORA) else []
    return ", ".join(notes) or None


def quantized_layers(patcher: ModelPatcher) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the bytes and FP32 weight_scale of a MODEL's quantized layers, by name."""
    layers = monitored_layers(patcher.model.diffusion_model)
    weights = {name: layer.weight for name, layer in layers.items()}
    return {
        name: (weight._qdata, weight.params.scale)
        for name, weight in weights.items()
        if isinstance(weight, QuantizedTensor)
    }
