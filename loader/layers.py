"""Which layers a file's diffusion model has, found by ComfyUI's own loading without weights."""

from __future__ import annotations

import os
from collections.abc import Mapping

import comfy.sd
import torch

from .modelfile import ModelFileError, diffusion_model_prefix
from .operations import hswq_operations


def layers_of(
    path: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping | None
) -> dict[str, torch.Tensor]:
    """Return the file's weight of every Linear and Conv2d by name, in the model's order.

    Args:
        path: of the file, for messages.
        tensors: of the file, mapped; they stay so.
        metadata: of the file.

    Raises:
        ModelFileError: ComfyUI does not know the model, or renames or rearranges its layers.
    """
    name = os.path.basename(path)
    layers: dict[str, torch.Tensor] = {}

    def note(layer: str, weight: torch.Tensor) -> torch.Tensor:
        layers[layer] = weight
        return torch.empty_like(weight, device="meta")

    operations = hswq_operations(note, manual_cast=False)
    model = comfy.sd.load_diffusion_model_state_dict(
        dict(tensors),
        model_options={"dtype": torch.float16, "custom_operations": operations},
        metadata=metadata,
    )
    if model is None:
        raise ModelFileError(f"{name} holds no diffusion model that ComfyUI knows")
    prefix = diffusion_model_prefix(tensors)
    for layer, weight in layers.items():
        if not _is(weight, tensors.get(f"{prefix}{layer}.weight")):
            raise ModelFileError(
                f"{name} is not in ComfyUI's own layout, which alone can be exported: "
                f"it has no {prefix}{layer}.weight"
            )
    return layers


def _is(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return (
        other is not None
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
