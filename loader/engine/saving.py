"""Saving a quantized model with ComfyUI's own nodes: as the 16-bit weights that it stands for."""

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

    They hand a model's weights to safetensors, which takes a QuantizedTensor's bytes for numbers
    of its 16-bit dtype: garbage, and beyond the end of its memory.
    """
    model.__class__ = _saving(type(model))


class _Saves16Bit:
    """What a quantized model has beside its own class."""

    def state_dict_for_saving(
        self, unet_state_dict: dict[str, torch.Tensor], *args, **kwargs
    ) -> dict[str, torch.Tensor]:
        # One layer at a time leaves the GPU; safetensors holds all of them on the CPU anyway.
        weights = {
            key: _patched(self.diffusion_model.get_submodule(key.rpartition(".")[0])).cpu()
            if isinstance(value, QuantizedTensor)
            else value
            for key, value in unet_state_dict.items()
        }
        return super().state_dict_for_saving(weights, *args, **kwargs)


@functools.cache
def _saving(model_class: type[BaseModel]) -> type[BaseModel]:
    """Return a model's class with that, under the same name: it shows in logs."""
    return type(model_class.__name__, (_Saves16Bit, model_class), {})


def _patched(layer: torch.nn.Module) -> torch.Tensor:
    """Return a quantized layer's 16-bit weight, as it is after loading completely.

    Where a weight is offloaded, its patches wait for the forward, in an attribute of the layer.
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
