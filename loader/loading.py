"""Loading a checkpoint so that its diffusion model becomes FP8 on the way in."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import NamedTuple

import comfy.hooks
import comfy.memory_management
import comfy.model_detection
import comfy.model_management as memory
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ..calibration import monitored_layers
from ..quant import Plan, Planner, SearchSettings, quantize
from ..quant.search import DEFAULT_SETTINGS
from .modelfile import ModelFileError, fingerprint, load_tensors
from .operations import hswq_operations
from .transfer import Transfer

ATTACHMENT = "hswq"
"""Key of the Plan among a ModelPatcher's attachments."""

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_WORK_BYTES = 512 << 20  # GPU memory that searching one layer may take


@dataclasses.dataclass(frozen=True)
class QuantizeSettings:
    """What a user chooses about quantizing.

    Attributes:
        scaled: V2 (True) or V1.
        keep_ratio: share of the measured layers that stay 16 bit.
        search: how finely amax is searched.
    """

    scaled: bool = True
    keep_ratio: float = 0.25
    search: SearchSettings = DEFAULT_SETTINGS


class Quantizer:
    """Quantizes layer after layer on the GPU, by a Plan or while making one."""

    def __init__(self, source: Plan | Planner, layers: int, *, resident: bool = False) -> None:
        """Take a Plan to apply or a Planner to make one, and how many layers will come.

        `resident` leaves the layers on the GPU; else they go back to the CPU for ComfyUI to load.
        """
        self._source: Plan | Planner | None = source
        self._resident = resident
        self._transfer = Transfer(memory.get_torch_device())
        self._progress = comfy.utils.ProgressBar(layers)
        memory.free_memory(_WORK_BYTES, self._transfer.device)

    def decide(
        self, name: str, weight: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's weight to keep, or its FP8 bytes and weight_scale (operations)."""
        memory.throw_exception_if_processing_interrupted()
        self._progress.update(1)
        source, transfer = self._source, self._transfer
        if not source.quantizes(name):
            source.add(name, weight)
            return transfer.up(weight) if self._resident else weight
        on_device = transfer.up(weight)
        parts = quantize(on_device, source.add(name, on_device), scaled=source.scaled)
        return parts if self._resident else tuple(transfer.down(part) for part in parts)

    def finish(self) -> Plan:
        """Return the Plan, complete what is still on its way, and let go of the statistics.

        Raises:
            ValueError: the statistics or the Plan belong to another model.
        """
        self._transfer.finish()
        source, self._source = self._source, None
        return source.finish()


def load_checkpoint(
    path: str,
    source: Plan | Planner,
    *,
    only_model: bool = False,
    disable_dynamic: bool = False,
) -> tuple[ModelPatcher, comfy.sd.CLIP | None, comfy.sd.VAE | None]:
    """Load a checkpoint with its diffusion model quantized by a Plan, or by one made on the way.

    Args:
        path: of a 16 or 32-bit checkpoint.
        source: a Plan to apply, or a Planner that makes one on the way.
        only_model: leave out CLIP and VAE.
        disable_dynamic: ComfyUI's, for clones without Dynamic VRAM.

    Returns:
        The quantized MODEL, CLIP and VAE, as the stock loader's. The MODEL's Plan is its
        attachment "hswq".

    Raises:
        ModelFileError: the file is damaged, unknown to ComfyUI or quantized already.
        ValueError: the statistics or the Plan belong to another model.
    """
    tensors, metadata = load_tensors(path)
    found = _inspect(tensors, metadata, os.path.basename(path))
    resident = _fits(source, found.layers)
    quantizer = Quantizer(source, len(found.layers), resident=resident)
    embeddings = folder_paths.get_folder_paths("embeddings")
    patcher, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
        tensors,
        output_vae=not only_model,
        output_clip=not only_model,
        embedding_directory=embeddings,
        model_options={
            "dtype": found.dtype,
            "custom_operations": hswq_operations(quantizer.decide, manual_cast=found.manual_cast),
        },
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    adopt(patcher, quantizer.finish(), os.path.basename(path))
    if resident:
        memory.load_models_gpu([patcher], force_full_load=True)
    patcher.cached_patcher_init = (reload_model, (path, patcher.get_attachment(ATTACHMENT)))
    stock = (path, embeddings, {}, {})
    if clip is not None:
        clip.patcher.cached_patcher_init = (comfy.sd.load_checkpoint_clip_patcher, stock)
    if getattr(vae, "patcher", None) is not None:
        vae.patcher.cached_patcher_init = (comfy.sd.load_checkpoint_vae_patcher, stock)
    return patcher, clip, vae


def check_checkpoint(path: str) -> None:
    """Refuse what the HSWQ loader could never quantize, where the stock loader is to load it.

    Raises:
        ModelFileError: the file is damaged, unknown to ComfyUI or quantized already.
    """
    tensors, metadata = load_tensors(path)
    _inspect(tensors, metadata, os.path.basename(path))


def reload_model(path: str, plan: Plan, disable_dynamic: bool = False) -> ModelPatcher:
    """Load a checkpoint's model again with the same Plan (ComfyUI's `cached_patcher_init`)."""
    return load_checkpoint(path, plan, only_model=True, disable_dynamic=disable_dynamic)[0]


def adopt(patcher: ModelPatcher, plan: Plan, name: str) -> None:
    """Mark a patcher as quantized by a Plan, and say so in the log."""
    patcher.set_attachments(ATTACHMENT, plan)
    # ComfyUI's cache of hooked weights copies float values into the parameter, past set_weight.
    patcher.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
    for warning in plan.warnings:
        logging.warning("HSWQ: %s: %s", name, warning)
    logging.info(
        "HSWQ: %s: %d layers quantized to FP8, %d kept in 16 bit, %.2f GiB of weights",
        name, len(plan.quantized), len(plan.kept), patcher.model_size() / 2**30,
    )  # fmt: skip


def is_quantized(patcher: ModelPatcher) -> bool:
    """Whether any Linear or Conv2d of a MODEL holds less than 16 bit a weight."""
    layers = monitored_layers(patcher.model.diffusion_model).values()
    weights = (getattr(layer, "weight", None) for layer in layers)
    return any(
        weight is not None and (isinstance(weight, QuantizedTensor) or weight.dtype.itemsize < 2)
        for weight in weights
    )


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


class _Found(NamedTuple):
    """What a checkpoint's diffusion model is made of.

    Attributes:
        dtype: of its 16-bit weights in memory.
        manual_cast: whether ComfyUI must cast them in each forward.
        layers: numbers of weights of its tensors with more than one axis, by layer name.
    """

    dtype: torch.dtype
    manual_cast: bool
    layers: dict[str, int]


def _inspect(tensors: dict[str, torch.Tensor], metadata: dict | None, name: str) -> _Found:
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    config = comfy.model_detection.model_config_from_unet(tensors, prefix, metadata=metadata)
    if config is None:
        raise ModelFileError(f"{name} holds no diffusion model that ComfyUI knows")
    stored = comfy.utils.weight_dtype(tensors, prefix)
    if config.quant_config is not None or stored.itemsize < 2:
        raise ModelFileError(f"{name} is quantized already: HSWQ needs the 16-bit checkpoint")
    dtype = memory.unet_dtype(
        model_params=comfy.utils.calculate_parameters(tensors, prefix),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=stored,
    )
    if dtype not in _SIXTEEN_BIT:
        dtype = stored if stored in _SIXTEEN_BIT else torch.float16
    compute = memory.unet_manual_cast(
        dtype, memory.get_torch_device(), config.supported_inference_dtypes
    )
    layers = {
        key.removeprefix(prefix).removesuffix(".weight"): tensor.numel()
        for key, tensor in tensors.items()
        if key.startswith(prefix) and key.endswith(".weight") and tensor.ndim > 1
    }
    return _Found(dtype, compute not in (None, dtype), layers)


def _fits(source: Plan | Planner, layers: dict[str, int]) -> bool:
    """Whether the quantized model may stay on the GPU right away.

    As ComfyUI does with a model that it loads directly to the GPU. Not under Dynamic VRAM, which
    wants weights on the host and would hold them twice.
    """
    device = memory.get_torch_device()
    if device.type != "cuda" or comfy.memory_management.aimdo_enabled:
        return False
    size = sum(
        count * (1 if source.quantizes(name) else 2) for name, count in layers.items()
    )
    free = memory.get_free_memory(device)
    return free > 1.1 * size + _WORK_BYTES + memory.minimum_inference_memory()
