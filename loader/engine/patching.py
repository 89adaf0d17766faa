"""Patches (LoRAs) on a GPU: what fits there stays, and patching leaves no gaps in its memory."""

from __future__ import annotations

from typing import NamedTuple

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import get_key_weight

from .transfer import moved


class _Backup(NamedTuple):
    """A weight without its patches, in ComfyUI's form.

    Attributes:
        weight: on the offload device.
        inplace_update: True copies its values into the patched weight, to take the patches off.
            False puts it in the patched weight's place.
    """

    weight: torch.Tensor
    inplace_update: bool


class PatchesOnGpu:
    """Is added to the class of a ModelPatcher, for how it applies patches."""

    _stays = False

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, *args, **kwargs
    ) -> int:
        """Load more of the model, or load it again with other patches.

        Before it applies other patches, ComfyUI moves the whole model to the host and back. A model
        that is on the GPU as a whole, and fits there, stays.
        """
        model = self.model
        is_whole = not getattr(model, "model_lowvram", True) and model.device == device_to
        fits = model.model_loaded_weight_memory + extra_memory > self.model_size()
        self._stays = stays = is_whole and fits and not self._exchanges_weights()
        try:
            return super().partially_load(device_to, extra_memory, *args, **kwargs)
        except BaseException:
            self._stays = False
            if stays:  # ComfyUI takes it off the GPU after errors of `load` alone
                self.detach()
            raise
        finally:
            self._stays = False

    def _exchanges_weights(self) -> bool:
        """Whether an object patch has weights, which it may take out of the model or bring into it.

        ComfyUI moves those with the whole model, and with nothing else.
        """
        objects = *self.object_patches.values(), *self.object_patches_backup.values()
        modules = (one for one in objects if isinstance(one, torch.nn.Module))
        return any(next(one.parameters(), None) is not None for one in modules)

    def unpatch_model(
        self, device_to: torch.device | None = None, unpatch_weights: bool = True
    ) -> None:
        """Take patches off, and move the model unless it stays."""
        stays, self._stays = self._stays, False
        super().unpatch_model(None if stays and unpatch_weights else device_to, unpatch_weights)

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        **kwargs,
    ) -> torch.Tensor | None:
        """Patch a weight; on a GPU, a layer's has its room first. All arguments are ComfyUI's.

        ComfyUI's own way allocates the new weight among the memory that patching takes for a while.
        The gaps are too small for the next one, and cudaMallocAsync, by which ComfyUI allocates,
        does not join them: with 3 GiB free, 1.7 GiB of weights left too little for a step (`bench
        small --free 3 --lora`).
        """
        if key in self.patches and not return_weight:
            weight, set_weight, _ = get_key_weight(self.model, key)
            place = device_to if weight.device == self.offload_device else weight.device
            if set_weight is not None and place not in (None, self.offload_device):
                self._make_room(key, weight, place)
                shape = comfy.lora.calculate_shape(self.patches[key], weight, key)
                inplace_update = shape == weight.shape
        return super().patch_weight_to_device(
            key, device_to, inplace_update, return_weight, **kwargs
        )

    def _make_room(self, key: str, weight: torch.Tensor, place: torch.device) -> None:
        """Back a weight up, and put a copy in its place, to be patched.

        The weight itself never changes: the patches of a merged model may hold it.
        """
        with torch.inference_mode(False), torch.no_grad():  # to be used in both modes
            values = weight.data
            room = values.clone() if weight.device == place else moved(values, place)
            if key not in self.backup:
                is_on_host = weight.device == self.offload_device
                kept = weight if is_on_host else moved(values, self.offload_device)
                self.backup[key] = _Backup(kept, inplace_update=False)
            comfy.utils.set_attr_param(self.model, key, room)
