"""What a model file's diffusion model is made of, and how ComfyUI would hold it."""

from __future__ import annotations

from typing import NamedTuple

import comfy.model_detection
import comfy.model_management as memory
import comfy.utils
import torch

from .modelfile import ModelFileError, diffusion_model_prefix

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


class Found(NamedTuple):
    """What a file's diffusion model is made of.

    Attributes:
        dtype: of its 16-bit weights in memory.
        manual_cast: whether ComfyUI must cast them in each forward.
        layers: numbers of weights of its tensors with more than one axis, by layer name.
        alone: whether there is nothing else in the file.
    """

    dtype: torch.dtype
    manual_cast: bool
    layers: dict[str, int]
    alone: bool


def detect(tensors: dict[str, torch.Tensor], metadata: dict | None, name: str) -> Found:
    """Find out about a file's tensors and metadata; `name` is for messages.

    Raises:
        ModelFileError: ComfyUI does not know the model.
    """
    prefix = diffusion_model_prefix(tensors)
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    config = comfy.model_detection.model_config_from_unet(tensors, prefix, metadata=metadata)
    if config is None and not prefix:
        config = _diffusers_config(tensors)
    if config is None:
        raise ModelFileError(f"{name} holds no diffusion model that ComfyUI knows")
    sixteen_bit = [tensor for tensor in own.values() if tensor.dtype.itemsize >= 2]
    dtype = _dtype_in_memory(sixteen_bit, config)
    supported = config.supported_inference_dtypes
    compute = memory.unet_manual_cast(
        None if config.quant_config is not None else dtype, memory.get_torch_device(), supported
    )
    layers = {
        key.removeprefix(prefix).removesuffix(".weight"): tensor.numel()
        for key, tensor in own.items()
        if key.endswith(".weight") and tensor.ndim > 1
    }
    return Found(dtype, compute not in (None, dtype), layers, not prefix)


def _diffusers_config(tensors: dict[str, torch.Tensor]) -> object | None:
    """Return ComfyUI's entry for a model in diffusers' layout, None where it knows none."""
    # Converting copies, and writes into what it is given.
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    converted = comfy.model_detection.convert_diffusers_mmdit(shapes, "")
    if converted is not None:
        return comfy.model_detection.model_config_from_unet(converted, "")
    return comfy.model_detection.model_config_from_diffusers_unet(tensors)


def _dtype_in_memory(tensors: list[torch.Tensor], config: object) -> torch.dtype:
    """Return ComfyUI's choice for the kept layers; where that is not 16 bit, the file's or FP16."""
    stored = comfy.utils.weight_dtype({str(i): tensor for i, tensor in enumerate(tensors)})
    chosen = memory.unet_dtype(
        model_params=sum(tensor.numel() for tensor in tensors),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=stored,
    )
    if chosen in _SIXTEEN_BIT:
        return chosen
    return stored if stored in _SIXTEEN_BIT else torch.float16
