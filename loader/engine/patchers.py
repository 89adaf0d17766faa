"""What can be told of a ModelPatcher: whose weights it has, and how they are held."""

from __future__ import annotations

import os

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ...calibration import monitored_layers
from ..files.fingerprints import fingerprint


def is_quantized(patcher: ModelPatcher) -> bool:
    """Whether any Linear or Conv2d of a MODEL holds less than 16 bit a weight."""
    layers = monitored_layers(patcher.model.diffusion_model).values()
    weights = (getattr(layer, "weight", None) for layer in layers)
    return any(
        weight is not None and (isinstance(weight, QuantizedTensor) or weight.dtype.itemsize < 2)
        for weight in weights
    )


def unknown_layers(patcher: ModelPatcher) -> str | None:
    """Return why a loader could not quantize what can be measured, None where it can.

    Loaders replace ComfyUI's own Linear and Conv2d; other ones keep their weights, whatever
    statistics say of them.
    """
    model, network = type(patcher.model).__name__, patcher.model.diffusion_model
    layers = monitored_layers(network)
    foreign = [
        n for n, layer in layers.items() if not isinstance(layer, comfy.ops.CastWeightBiasOp)
    ]
    if foreign:
        return f"{len(foreign)} layers of {model}, such as {foreign[0]}, are not made by ComfyUI"
    return None if layers else f"{model} has no Linear or Conv2d layers"


def identity(patcher: ModelPatcher) -> tuple[str, str] | None:
    """Return path and fingerprint of the file whose weights a MODEL has.

    None for a merge and for a model of unknown origin. Stock loaders leave the path in the
    arguments that load the model again; a merge keeps those of its first model.
    """
    init = patcher.cached_patcher_init
    path = init[1][0] if init and init[1] else None
    if not isinstance(path, str) or not os.path.isfile(path) or _is_merge(patcher):
        return None
    return path, fingerprint(path)


def _is_merge(patcher: ModelPatcher) -> bool:
    """Tell merges from LoRAs: their patches are whole weights, or scale the model's own."""
    return any(
        isinstance(patch[1], list) or patch[2] != 1.0
        for patches in patcher.patches.values()
        for patch in patches
    )


def networks(patcher: ModelPatcher) -> list[torch.nn.Module]:
    """Return the diffusion model, and its clones that sample along on other GPUs."""
    others = patcher.get_additional_models_with_key("multigpu")
    return [one.model.diffusion_model for one in (patcher, *others)]


def patches(patcher: ModelPatcher) -> str | None:
    """Return a note on LoRAs and their like on a MODEL, None where it has none."""
    patched = set(patcher.patches).union(*patcher.hook_patches.values())
    return f"patches on {len(patched)} weights" if patched else None
