"""A loader as other extensions have it: operations, weights and patcher of their own, as for GGUF.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

from pathlib import Path

import comfy.lora
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file
from torch import Tensor
from toy.checkpoint import UNET_PREFIX


class Packed(Tensor):
    """A weight in 8 bits a value with a scale for each row, which torch takes for bytes.

    Attributes:
        scale: of each row, FP32.
        patches: of ComfyUI, which are applied to the float weight in each forward.
    """

    scale: Tensor
    patches: tuple[list, str] | None = None

    @classmethod
    def of(cls, values: Tensor) -> Packed:
        scale = values.float().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        scale = scale.view(-1, *[1] * (values.ndim - 1))
        packed = (values.float() / scale).round().to(torch.int8).as_subclass(cls)
        packed.scale = scale
        return packed

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        values = self.as_subclass(Tensor).float() * self.scale.to(self.device)
        if self.patches is not None:
            patches, key = self.patches
            values = comfy.lora.calculate_weight(patches, values, key)
        return values.to(dtype)

    def to(self, *args, **kwargs) -> Packed:
        return self._with_its(super().to(*args, **kwargs))

    def clone(self, *_, **__) -> Packed:
        return self

    def detach(self) -> Packed:
        return self._with_its(super().detach())

    def _with_its(self, other: Tensor) -> Packed:
        other.scale, other.patches = self.scale, self.patches
        return other


class _Unpacking:
    """What the layers share: they unpack their weight in each forward."""

    comfy_cast_weights = True

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        for key in ("weight", "bias"):
            value = state_dict.get(prefix + key)
            if value is not None:
                setattr(self, key, torch.nn.Parameter(value, requires_grad=False))

    def forward(self, inputs: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if isinstance(weight, Packed):
            weight = weight.unpacked(inputs.dtype)
        bias = None if bias is None else bias.to(inputs.device, inputs.dtype)
        return self._product(inputs, weight.to(inputs.device, inputs.dtype), bias)


class Operations(comfy.ops.manual_cast):
    class Linear(_Unpacking, comfy.ops.manual_cast.Linear):
        def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return torch.nn.functional.linear(inputs, weight, bias)

    class Conv2d(_Unpacking, comfy.ops.manual_cast.Conv2d):
        def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._conv_forward(inputs, weight, bias)


class Patcher(ModelPatcher):
    """Leaves patches beside packed weights."""

    def patch_weight_to_device(self, key: str, *args, **kwargs) -> object:
        weight = comfy.utils.get_attr(self.model, key)
        if key not in self.patches or not isinstance(weight, Packed):
            return super().patch_weight_to_device(key, *args, **kwargs)
        weight.patches = self.patches[key], key
        return None

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True):
        if unpatch_weights:
            for parameter in self.model.parameters():
                if isinstance(parameter, Packed):
                    parameter.patches = None
        return super().unpatch_model(device_to, unpatch_weights)

    def clone(self, *args, **kwargs) -> ModelPatcher:
        clone = super().clone(*args, **kwargs)
        clone.__class__ = Patcher
        return clone


def load_foreign(checkpoint: Path, *, packed: bool) -> ModelPatcher:
    """Load a checkpoint's diffusion model so, in 8 bits or in 16."""
    tensors = {
        key.removeprefix(UNET_PREFIX): value
        for key, value in load_file(checkpoint).items()
        if key.startswith(UNET_PREFIX)
    }
    if packed:
        tensors = {
            key: Packed.of(value) if value.ndim > 1 else value for key, value in tensors.items()
        }
    options = {"custom_operations": Operations, "dtype": torch.float16}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        tensors, model_options=options, disable_dynamic=True
    )
    patcher.__class__ = Patcher
    return patcher
