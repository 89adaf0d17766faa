"""Loading a model file so that its diffusion model is FP8 when it arrives."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import MappingProxyType

import comfy.hooks
import comfy.model_management as memory
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ...calibration import monitored_layers
from ...quant import FP8_MAX, LayerPlan, Plan, Planner
from ..files.errors import ModelFileError
from ..files.fingerprints import fingerprint
from ..files.layer_formats import MODEL_MARKERS
from ..files.model_file import diffusion_model_prefix, is_stored_quantized, load_tensors
from .adopt import adopt
from .matmul import description, multiply_in_fp8
from .model_structure import check_whole, detect, explained, find_layers
from .operations import hswq_operations
from .originals import Originals
from .quantizer import Quantizer, make_room

STORED = "as the file has it"
"""Reason in the Plan of a model whose file is quantized already."""


def load_checkpoint(
    path: str,
    source: Plan | Planner | None,
    *,
    fp8_matmul: bool = False,
    only_model: bool = False,
    to_host: bool = False,
    disable_dynamic: bool = False,
) -> tuple[ModelPatcher, comfy.sd.CLIP | None, comfy.sd.VAE | None]:
    """Load a checkpoint with its diffusion model in FP8, kept layers in 16 bit.

    Args:
        path: of the checkpoint.
        source: a Plan to apply, or a Planner that makes one on the way; None for a file that is
            quantized already, which keeps what it has.
        fp8_matmul: multiply in FP8 where the device can (see matmul).
        only_model: leave out CLIP and VAE.
        to_host: leave the model to ComfyUI to load, also where it fits on the GPU.
        disable_dynamic: ComfyUI's, for clones without Dynamic VRAM.

    Returns:
        The quantized MODEL, CLIP and VAE, as the stock loader's. The MODEL's Plan is its
        attachment "hswq".

    Raises:
        ModelFileError: the file is damaged, unknown to ComfyUI, or quantized when it should not
            be (and the other way round).
        ValueError: the statistics or the Plan belong to another model.
    """
    load = _Load(path, source, checkpoint=True, to_host=to_host)
    with explained(path):
        patcher, *_ = comfy.sd.load_state_dict_guess_config(
            dict(load.tensors),  # it takes out what it has loaded
            output_vae=False,
            output_clip=False,
            model_options=load.options,
            metadata=load.metadata,
            disable_dynamic=disable_dynamic or load.resident,
        )
        others = (None, None) if only_model else _clip_and_vae(load, path, disable_dynamic)
    load.complete(patcher, _reload_checkpoint, fp8_matmul)
    return patcher, *others


def _clip_and_vae(
    load: _Load, path: str, disable_dynamic: bool
) -> tuple[comfy.sd.CLIP | None, comfy.sd.VAE | None]:
    """Load what is not ours as stock does, also where our model goes without Dynamic VRAM."""
    embeddings = folder_paths.get_folder_paths("embeddings")
    _, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
        load.tensors,
        output_model=False,
        embedding_directory=embeddings,
        model_options=load.options,
        metadata=load.metadata,
        disable_dynamic=disable_dynamic,
    )
    stock = (path, embeddings, {}, {})
    if clip is not None:
        clip.patcher.cached_patcher_init = (comfy.sd.load_checkpoint_clip_patcher, stock)
    if getattr(vae, "patcher", None) is not None:
        vae.patcher.cached_patcher_init = (comfy.sd.load_checkpoint_vae_patcher, stock)
    return clip, vae


def load_diffusion_model(
    path: str,
    source: Plan | Planner | None,
    *,
    fp8_matmul: bool = False,
    to_host: bool = False,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Load a file that holds a diffusion model alone; otherwise as load_checkpoint."""
    load = _Load(path, source, checkpoint=False, to_host=to_host)
    with explained(path):
        patcher = comfy.sd.load_diffusion_model_state_dict(
            load.tensors,
            model_options=load.options,
            metadata=load.metadata,
            disable_dynamic=disable_dynamic or load.resident,
        )
    load.complete(patcher, _reload_diffusion_model, fp8_matmul)
    return patcher


# ComfyUI's `cached_patcher_init` for clones with weights of their own, maybe on another GPU.


def _reload_checkpoint(
    path: str,
    source: Plan | None,
    fp8_matmul: bool = False,
    legacy: bool = False,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Load a checkpoint's model again with the same Plan, as `legacy` as it was."""
    return load_checkpoint(
        path, source, fp8_matmul=fp8_matmul, only_model=True, to_host=True,
        disable_dynamic=disable_dynamic or legacy,
    )[0]  # fmt: skip


def _reload_diffusion_model(
    path: str,
    source: Plan | None,
    fp8_matmul: bool = False,
    legacy: bool = False,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    return load_diffusion_model(
        path, source, fp8_matmul=fp8_matmul, to_host=True,
        disable_dynamic=disable_dynamic or legacy,
    )  # fmt: skip


def check_model(path: str) -> None:
    """Refuse a file that ComfyUI cannot load, where the stock loader is to load it.

    Raises:
        ModelFileError: the file is damaged, unknown to ComfyUI, or lacks layers.
    """
    find_layers(os.path.basename(path), *load_tensors(path))


class _Load:
    """One load: what ComfyUI's loader is given, and what is done with the patcher it returns."""

    def __init__(
        self, path: str, source: Plan | Planner | None, *, checkpoint: bool, to_host: bool
    ) -> None:
        self._path, self._name = path, os.path.basename(path)
        self.tensors, self.metadata = load_tensors(path)
        found = detect(self.tensors, self.metadata, self._name)
        if checkpoint and found.alone:  # ComfyUI would load it without our operations
            find_layers(self._name, self.tensors, self.metadata)  # if it is a model at all
            raise ModelFileError(
                f"{self._name} is a diffusion model alone: put it into models/diffusion_models, "
                "for Load Diffusion Model (HSWQ FP8)"
            )
        stored_quantized = is_stored_quantized(path)
        if stored_quantized != (source is None):
            state = "quantized already" if stored_quantized else "not quantized"
            raise ModelFileError(f"{self._name} is {state}")
        prefix = diffusion_model_prefix(self.tensors)
        for marker in MODEL_MARKERS:  # a text encoder has its own, which it needs
            self.tensors.pop(prefix + marker, None)
        self._quantizer, self.resident, decide = None, False, _keep
        if source is not None:
            self.resident = not to_host and make_room(source, found.layers)
            self._quantizer = Quantizer(source, len(found.layers), resident=self.resident)
            decide = self._quantizer.decide
        self._originals = Originals(path, prefix)
        operations = hswq_operations(
            decide, manual_cast=found.manual_cast, originals=self._originals
        )
        self.options = {"dtype": found.dtype, "custom_operations": operations}

    def complete(self, patcher: ModelPatcher, reload: Callable, fp8_matmul: bool) -> None:
        """Attach the Plan, and tell ComfyUI how to load the model again."""
        check_whole(self._name, patcher.model.diffusion_model)
        if self._quantizer is not None:
            plan = again = self._originals.plan = self._quantizer.finish()
        else:
            plan, again = _plan_as_stored(patcher), None
        _check_quantized(self._name, patcher, plan)
        adopt(patcher, plan, self._name, fingerprint(self._path))
        if fp8_matmul:
            multiply_in_fp8(patcher, plan)
            logging.info("HSWQ: %s: %s", self._name, description(patcher))
        patcher.cached_patcher_init = (reload, (self._path, again, fp8_matmul, self.resident))
        if self.resident:
            # Not load_models_gpu, which would free as much again for what is there already.
            loaded = memory.LoadedModel(patcher)
            loaded.model_load()
            memory.current_loaded_models.insert(0, loaded)


def _check_quantized(name: str, patcher: ModelPatcher, plan: Plan) -> None:
    """Refuse a model that is not what its Plan says: ComfyUI may have loaded it without us."""
    layers = monitored_layers(patcher.model.diffusion_model)
    held = [layer for layer, one in layers.items() if isinstance(one.weight, QuantizedTensor)]
    if set(held) != set(plan.quantized):
        raise ModelFileError(
            f"{name} was loaded with {len(held)} layers in FP8, not with {len(plan.quantized)}"
        )


def _keep(_: str, weight: torch.Tensor) -> torch.Tensor:
    return weight


def _plan_as_stored(patcher: ModelPatcher) -> Plan:
    """Describe a model whose file decided about its layers."""
    layers = {}
    for name, layer in monitored_layers(patcher.model.diffusion_model).items():
        weight = layer.weight
        quantized = isinstance(weight, QuantizedTensor)
        amax = weight.params.scale.item() * FP8_MAX if quantized else None
        input_amax = getattr(layer, "stored_input_amax", None)
        layers[name] = LayerPlan(name, amax, STORED, input_amax=input_amax)
    kept = sum(not layer.quantized for layer in layers.values())
    scaled = any(layer.amax not in (None, FP8_MAX) for layer in layers.values())
    return Plan(scaled, kept / max(1, len(layers)), MappingProxyType(layers))
