"""Saving a quantized model with ComfyUI's own nodes: they save its weights in 16 bit."""

from __future__ import annotations

import functools

import comfy.lora
import comfy.model_management as memory
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.quant_ops import QuantizedTensor


def save_as_16_bit(model: BaseModel) -> None:
    """Let CheckpointSave and ModelSave write files that every loader reads.

    Both hand a model's weights to safetensors. It would read a QuantizedTensor's FP8 bytes as
    16-bit numbers: it would save garbage, and read beyond the end of the memory.
    """
    model.__class__ = _saving(type(model))


class _Saves16Bit:
    """What a quantized model's class has in addition to its own."""

    def state_dict_for_saving(
        self, unet_state_dict: dict[str, torch.Tensor], *args, **kwargs
    ) -> dict[str, torch.Tensor]:
        # One layer at a time goes to the CPU, where safetensors needs all of them anyway.
        weights = {
            key: _patched(self.diffusion_model.get_submodule(key.rpartition(".")[0])).cpu()
            if isinstance(value, QuantizedTensor)
            else value
            for key, value in unet_state_dict.items()
        }
        return super().state_dict_for_saving(weights, *args, **kwargs)


@functools.cache
def _saving(model_class: type[BaseModel]) -> type[BaseModel]:
    """Return a subclass that saves 16 bit, under the same name because logs show it."""
    return type(model_class.__name__, (_Saves16Bit, model_class), {})


def _patched(layer: torch.nn.Module) -> torch.Tensor:
    """Return a quantized layer's 16-bit weight with its patches.

    Patches of an offloaded weight are not in it yet: they wait in an attribute of the layer until
    the forward.
    """
    weight = layer.weight
    waiting = [*layer.weight_function, getattr(layer, "weight_lowvram_function", None)]
    for patch in waiting:
        if getattr(patch, "is_lowvram_patch", False):
            device = memory.get_torch_device()
            values = layer.convert_weight(weight.to(device, memory.lora_compute_dtype(device)))
            values = comfy.lora.calculate_weight(patch.patches[patch.key], values, patch.key)
            seed = comfy.utils.string_to_seed(patch.key)
            weight = layer.set_weight(values, seed=seed, return_weight=True)
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
