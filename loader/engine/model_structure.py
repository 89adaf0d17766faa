"""Which layers a file's diffusion model has, and in which dtype ComfyUI would hold them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple, TypeVar

import comfy.model_detection
import comfy.model_management as memory
import comfy.sd
import comfy.utils
import torch
from comfy import supported_models_base

from ...calibration import monitored_layers
from ..files.errors import ModelFileError
from ..files.layer_formats import DTYPE_KEY, STORED
from ..files.model_file import ModelFile
from ..files.safetensors import DTYPE_NAMES
from .operations import hswq_operations

_T = TypeVar("_T")


def layers_of(file: ModelFile) -> dict[str, torch.Tensor]:
    """Return the file's weight of every Linear and Conv2d by name, in the model's order.

    The weights are mapped from the file, not read.

    Raises:
        ModelFileError: ComfyUI does not know the model, or renames or rearranges its layers; or
            the file lacks some of them.
    """
    layers, tensors = find_layers(file), file.tensors
    for layer, weight in layers.items():
        if not _is_same_memory(weight, tensors.get(f"{file.prefix}{layer}.weight")):
            raise ModelFileError(
                f"{file.name} is not in ComfyUI's own layout, and only that can be exported: "
                f"it has no {file.prefix}{layer}.weight"
            )
    return layers


def find_layers(file: ModelFile) -> dict[str, torch.Tensor]:
    """Return what layers_of does, but for a file in any layout that ComfyUI reads.

    ComfyUI itself builds the model, without memory for its weights, and converts the names.

    Raises:
        ModelFileError: the file holds no diffusion model, or one that ComfyUI cannot build.
    """
    layers: dict[str, torch.Tensor] = {}

    def note(layer: str, weight: torch.Tensor, _: torch.device) -> torch.Tensor:
        layers[layer] = weight
        return torch.empty_like(weight, device="meta")

    operations = hswq_operations(note, manual_cast=False)
    try:
        model = comfy.sd.load_diffusion_model_state_dict(
            file.tensors,
            model_options={"dtype": torch.float16, "custom_operations": operations},
            metadata=file.metadata,
        )
    except memory.OOM_EXCEPTION:  # this is not the file's fault
        raise
    except Exception as error:  # ComfyUI raises many kinds for a file that it cannot load
        reason = " ".join(str(error).split("\n", 2)[:2]).replace("\t", "")
        raise ModelFileError(
            f"{file.name} cannot be loaded as a diffusion model: {reason}"
        ) from error
    if model is None:
        raise ModelFileError(f"{file.name} holds no diffusion model that ComfyUI knows")
    check_whole(file.name, model.model.diffusion_model)
    return layers


def check_whole(name: str, network: torch.nn.Module) -> None:
    """Refuse a model with layers that its file lacks: their weights are None.

    Raises:
        ModelFileError: the model has such layers.
    """
    layers = monitored_layers(network)
    lacking = [layer for layer, module in layers.items() if module.weight is None]
    if lacking:
        raise ModelFileError(
            f"{name} is not a complete diffusion model: it lacks {len(lacking)} of the "
            f"{len(layers)} layers of ComfyUI's {type(network).__name__}, such as {lacking[0]}"
        )


@contextmanager
def explained(file: ModelFile) -> Iterator[None]:
    """Turn errors that a file or one of its layers causes in the block into one that names it.

    Raises:
        ModelFileError: as find_layers. Errors that are not the file's fault are raised unchanged.
    """
    try:
        yield
    except ModelFileError as error:  # about a layer
        raise ModelFileError(f"{file.name}: {error}") from error
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        find_layers(file)
        raise


def _is_same_memory(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether ComfyUI has passed a file's tensor on unchanged."""
    return (
        other is not None
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


class Structure(NamedTuple):
    """What a file's diffusion model consists of.

    Attributes:
        dtype: of its 16-bit weights in memory.
        manual_cast: whether ComfyUI must cast them in each forward.
        layers: number of weights of each layer by name, for tensors with more than one axis.
        first: name of the projection from the latent; None if its shape does not identify it.
        last: name of the projection back to the latent; None as for `first`.
        config: ComfyUI's configuration of the model, set to build all of it but the network.
    """

    dtype: torch.dtype
    manual_cast: bool
    layers: dict[str, int]
    first: str | None
    last: str | None
    config: supported_models_base.BASE


def detect(file: ModelFile) -> Structure:
    """Return how ComfyUI would build a file's diffusion model; found out once a ModelFile.

    Raises:
        ModelFileError: ComfyUI does not know the model.
    """
    if file not in _detected:
        _detected[file] = _detect(file)
    return _detected[file]


_detected: weakref.WeakKeyDictionary[ModelFile, Structure] = weakref.WeakKeyDictionary()


def _detect(file: ModelFile) -> Structure:
    config = _from_shapes(file, lambda tensors: _config(file, tensors))
    if config is None:
        raise ModelFileError(f"{file.name} holds no diffusion model that ComfyUI knows")
    dtype = _dtype_in_memory(file, config)
    supported = config.supported_inference_dtypes
    compute = memory.unet_manual_cast(
        None if config.quant_config is not None else dtype, memory.get_torch_device(), supported
    )
    shapes = {
        name.removesuffix(".weight"): entry.shape
        for name, entry in file.own.items()
        if name.endswith(".weight") and len(entry.shape) > 1
    }
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    ends = _ends(shapes, config.unet_config)
    config.set_inference_dtype(dtype, compute, device=memory.get_torch_device())
    config.unet_config["disable_unet_model_creation"] = True  # ComfyUI's own option
    return Structure(dtype, compute not in (None, dtype), sizes, *ends, config)


def _from_shapes(file: ModelFile, ask: Callable[[dict[str, torch.Tensor]], _T]) -> _T:
    """Ask ComfyUI about a file's tensors without mapping each of them, if shapes are enough."""
    try:
        return ask(file.hollow)
    except RuntimeError:  # of a few models, weights' values are asked for
        return ask(file.tensors)


def _ends(shapes: dict[str, tuple[int, ...]], numbers: dict) -> tuple[str | None, str | None]:
    """Return the names of the projections from the latent and back to it (see Structure).

    Each is the only layer whose input (or output) is as wide as a patch of the latent.

    Args:
        shapes: (out, in, ...) of the layers' weights.
        numbers: unet_config of ComfyUI's detection: channels, and the side of a patch.
    """
    entering = numbers.get("in_channels")
    leaving = numbers.get("out_channels") or entering
    areas = [side * side for side in (numbers.get("patch_size") or 1, 1)]

    def only(axis: int, channels: int | None) -> str | None:
        for area in areas if channels else ():
            found = [name for name, shape in shapes.items() if shape[axis] == channels * area]
            if len(found) == 1:
                return found[0]
        return None

    return only(1, entering), only(0, leaving)


def needed_beside(file: ModelFile, pixels: int = 1024) -> float:
    """Return the bytes that ComfyUI expects a step to take beside a model's weights.

    The step is that of a picture with cfg, of so many pixels each way.

    Raises:
        ModelFileError: ComfyUI does not know the model, or cannot build it.
    """
    structure = detect(file)
    with explained(file):
        model = _from_shapes(file, lambda its: structure.config.get_model(its, file.prefix))
    model.diffusion_model = SimpleNamespace(dtype=structure.dtype)
    latent = model.latent_format
    edge = pixels // latent.spacial_downscale_ratio
    times = [1] * (latent.latent_dimensions - 2)
    return model.memory_required([2, latent.latent_channels, *times, edge, edge])


def sixteen_bit_options(file: ModelFile) -> dict[str, torch.dtype]:
    """Return the model_options with which ComfyUI's own loaders load a file's model in 16 bit.

    They are empty unless ComfyUI was started with the option to load every model in FP8.

    Raises:
        ModelFileError: ComfyUI does not know the model.
    """
    if memory.unet_dtype().itemsize >= 2:
        return {}
    return {"dtype": detect(file).dtype}


def _config(file: ModelFile, tensors: dict[str, torch.Tensor]) -> object | None:
    """Return ComfyUI's configuration for a file's model; None if it has none."""
    config = comfy.model_detection.model_config_from_unet(
        tensors, file.prefix, metadata=file.metadata
    )
    if config is None and not file.prefix:
        return _diffusers_config(tensors)
    return config


def _diffusers_config(tensors: dict[str, torch.Tensor]) -> object | None:
    """Return ComfyUI's configuration for a model in diffusers' layout; None if it has none."""
    # Tensors without memory, because the conversion copies tensors and changes the dict.
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    converted = comfy.model_detection.convert_diffusers_mmdit(shapes, "")
    if converted is not None:
        return comfy.model_detection.model_config_from_unet(converted, "")
    return comfy.model_detection.model_config_from_diffusers_unet(tensors)


def stored_dtype(file: ModelFile) -> torch.dtype:
    """Return the dtype of most of a diffusion model's weights, before any were quantized.

    For an exported file it is in the metadata.
    """
    names = {name: dtype for dtype, name in DTYPE_NAMES.items() if dtype.itemsize >= 2}
    said = names.get((file.metadata or {}).get(DTYPE_KEY))
    own = {name: one for name, one in file.hollow.items() if name.startswith(file.prefix)}
    if said is not None and any(one.dtype in STORED for one in own.values()):
        return said
    return comfy.utils.weight_dtype({k: one for k, one in own.items() if one.dtype.itemsize >= 2})


def _dtype_in_memory(file: ModelFile, config: object) -> torch.dtype:
    """Return ComfyUI's choice for the kept layers; if that is not 16 bit, the file's, or FP16."""
    stored = stored_dtype(file)
    chosen = memory.unet_dtype(
        model_params=sum(math.prod(entry.shape) for entry in file.own.values()),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=stored,
    )
    if chosen in _SIXTEEN_BIT:
        return chosen
    return stored if stored in _SIXTEEN_BIT else torch.float16
