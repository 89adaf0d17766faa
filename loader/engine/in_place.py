"""Patches (LoRAs) on a model that is on the GPU: they are applied there, in place."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import comfy.utils
import torch
from comfy.model_patcher import get_key_weight


class _Backup(NamedTuple):
    """A weight without its patches, in ComfyUI's form.

    Attributes:
        weight: on the offload device.
        inplace_update: whether its values are copied back. Else it takes the patched weight's
            place, which moves nothing if that leaves the GPU.
    """

    weight: torch.Tensor
    inplace_update: bool


class PatchesInPlace:
    """What is added to the class of a ModelPatcher."""

    _stays = False
    _spare: Mapping[str, _Backup] = MappingProxyType({})  # backups whose values are back in place

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
        self._spare = dict(self.backup) if stays else {}
        try:
            return super().partially_load(device_to, extra_memory, *args, **kwargs)
        except BaseException:
            self._stays = False
            if stays:  # ComfyUI takes it off the GPU after errors of `load` alone
                self.detach()
            raise
        finally:
            self._stays, self._spare = False, {}

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
        if stays and unpatch_weights:
            device_to = None
            for key, kept in self.backup.items():  # else the backups take the weights' places
                alike = get_key_weight(self.model, key)[0].shape == kept.weight.shape
                self.backup[key] = kept._replace(inplace_update=alike)
        super().unpatch_model(device_to, unpatch_weights)

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        **kwargs,
    ) -> torch.Tensor | None:
        """Patch a weight; a layer's in place, on the GPU. Arguments and result are ComfyUI's.

        The weight goes to the GPU before it is patched. ComfyUI's own way allocates the new weight
        among the memory that patching takes for a while, and leaves gaps that are too small for the
        next one. ComfyUI's allocator, cudaMallocAsync, does not join them: with 3 GiB free, 1.7 GiB
        of weights left too little for a step (`bench small --free 3 --lora`).
        """
        weight, set_weight, _ = get_key_weight(self.model, key)
        is_patched = key in self.patches and set_weight is not None and not return_weight
        is_there = is_patched and weight.device != self.offload_device
        place = weight.device if is_there else device_to
        if is_patched and place not in (None, self.offload_device):
            if key not in self.backup:
                spare = self._spare.get(key) if is_there else None
                kept = spare.weight if spare else weight.to(self.offload_device, copy=is_there)
                self.backup[key] = _Backup(kept, inplace_update=False)
            if not is_there:
                with torch.inference_mode(False), torch.no_grad():  # to be used in both modes
                    comfy.utils.set_attr_param(self.model, key, weight.to(place))
            inplace_update = True
        return super().patch_weight_to_device(
            key, device_to, inplace_update, return_weight, **kwargs
        )
