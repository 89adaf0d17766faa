"""Which layers a file's diffusion model has, found by ComfyUI's own loading without weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import comfy.model_detection
import comfy.model_management as memory
import comfy.sd
import comfy.utils
import torch

from ...calibration import monitored_layers
from ..files.errors import ModelFileError
from ..files.model_file import diffusion_model_prefix, load_tensors
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
        ModelFileError: ComfyUI does not know the model, or renames or rearranges its layers; or
            the file lacks some.
    """
    name = os.path.basename(path)
    layers = find_layers(name, tensors, metadata)
    prefix = diffusion_model_prefix(tensors)
    for layer, weight in layers.items():
        if not _is(weight, tensors.get(f"{prefix}{layer}.weight")):
            raise ModelFileError(
                f"{name} is not in ComfyUI's own layout, which alone can be exported: "
                f"it has no {prefix}{layer}.weight"
            )
    return layers


def find_layers(
    name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping | None
) -> dict[str, torch.Tensor]:
    """Return what layers_of does, of a file in any layout that ComfyUI reads.

    Raises:
        ModelFileError: the file holds no diffusion model, or none that ComfyUI can build.
    """
    layers: dict[str, torch.Tensor] = {}

    def note(layer: str, weight: torch.Tensor, _: torch.device) -> torch.Tensor:
        layers[layer] = weight
        return torch.empty_like(weight, device="meta")

    operations = hswq_operations(note, manual_cast=False)
    try:
        model = comfy.sd.load_diffusion_model_state_dict(
            dict(tensors),
            model_options={"dtype": torch.float16, "custom_operations": operations},
            metadata=metadata,
        )
    except memory.OOM_EXCEPTION:
        raise
    except Exception as error:  # whatever a file makes ComfyUI stumble over
        reason = " ".join(str(error).split("\n", 2)[:2]).replace("\t", "")
        raise ModelFileError(f"{name} is no diffusion model that loads: {reason}") from error
    if model is None:
        raise ModelFileError(f"{name} holds no diffusion model that ComfyUI knows")
    check_whole(name, model.model.diffusion_model)
    return layers


def check_whole(name: str, network: torch.nn.Module) -> None:
    """Refuse a model that was loaded from a file which lacks layers; their weights are None.

    Raises:
        ModelFileError: it is such a file.
    """
    layers = monitored_layers(network)
    lacking = [layer for layer, module in layers.items() if module.weight is None]
    if lacking:
        raise ModelFileError(
            f"{name} is no whole diffusion model: it lacks {len(lacking)} of the {len(layers)} "
            f"layers that ComfyUI's {type(network).__name__} has, such as {lacking[0]}"
        )


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Where the block stumbles over a file or one of its layers, say which and what is wrong.

    Raises:
        ModelFileError: as find_layers; what is not the file's fault is raised as it is.
    """
    try:
        yield
    except ModelFileError as error:  # about a layer
        raise ModelFileError(f"{os.path.basename(path)}: {error}") from error
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        find_layers(os.path.basename(path), *load_tensors(path))
        raise


def _is(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return (
        other is not None
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


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


def sixteen_bit_options(path: str) -> dict[str, torch.dtype]:
    """Return the model_options by which ComfyUI's own loaders give a file's model in 16 bit.

    They are empty but where ComfyUI was told to load every model in FP8.

    Raises:
        ModelFileError: ComfyUI does not know the model.
    """
    if memory.unet_dtype().itemsize >= 2:
        return {}
    return {"dtype": detect(*load_tensors(path), os.path.basename(path)).dtype}


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
