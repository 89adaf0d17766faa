"""Loading a model file so that its diffusion model is quantized from the start."""

from __future__ import annotations

import logging
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
from ...quant import (
    FP8_MAX,
    INT8,
    INT8_MAX,
    Decider,
    KnownPlan,
    LayerPlan,
    Plan,
    Reason,
    decider_of,
    fp8_format,
)
from ..files.errors import ModelFileError
from ..files.layer_formats import MODEL_MARKERS
from ..files.model_file import ModelFile, opened
from .adopt import adopt
from .identity import remember
from .int8_matmul import multiply_in_int8
from .matmul import multiply_in_fp8, products
from .model_structure import Structure, check_whole, detect, explained, find_layers
from .operations import hswq_operations
from .originals import Originals
from .quantizer import Quantizer, make_room, restrict


def load_checkpoint(
    file: ModelFile | str,
    how: Decider | Plan | None,
    *,
    fp8_matmul: bool = False,
    int8_matmul: bool = False,
    only_model: bool = False,
    to_host: bool = False,
) -> tuple[ModelPatcher, comfy.sd.CLIP | None, comfy.sd.VAE | None]:
    """Load a checkpoint with its diffusion model quantized and the kept layers in 16 bit.

    The MODEL goes without Dynamic VRAM, as ComfyUI allows: that would keep a second copy of it in
    host memory, would make that copy in the first step, and would ask about each layer in every
    step. CLIP and VAE are as the stock loader's.

    Args:
        file: the checkpoint, or its path.
        how: decides about each layer; or a Plan to repeat; or None for a file that is quantized
            already and stays as it is.
        fp8_matmul: multiply FP8 layers in FP8 if the device can (see matmul).
        int8_matmul: multiply INT8 layers in INT8 if the device can (see int8_matmul).
        only_model: leave out CLIP and VAE.
        to_host: put the model into host memory even if it fits on the GPU.

    Returns:
        The quantized MODEL, CLIP and VAE, as from the stock loader. The MODEL's Plan is its
        attachment "hswq".

    Raises:
        ModelFileError: the file is damaged or unknown to ComfyUI; or it is quantized and `how` is
            given; or it is not quantized and `how` is None.
        ValueError: the statistics or the Plan belong to another model.
    """
    file = opened(file)
    structure = detect(file)
    if not file.prefix:  # ComfyUI's checkpoint loader would load such a file without our operations
        find_layers(file)  # raises if it is no model at all
        raise ModelFileError(
            f"{file.name} holds only a diffusion model: put it into models/diffusion_models and "
            "use Load Diffusion Model (HSWQ FP8)"
        )
    load = _Load(file, structure, how, to_host=to_host)
    with explained(file):
        patcher, *_ = comfy.sd.load_state_dict_guess_config(
            load.tensors(),
            output_vae=False,
            output_clip=False,
            model_options=load.options,
            metadata=file.metadata,
            disable_dynamic=True,
        )
        others = (None, None) if only_model else _clip_and_vae(load)
    _complete(load, patcher, fp8_matmul, int8_matmul)
    return patcher, *others


def _clip_and_vae(load: _Load) -> tuple[comfy.sd.CLIP | None, comfy.sd.VAE | None]:
    """Load CLIP and VAE as the stock loader does, by Dynamic VRAM where ComfyUI has it."""
    embeddings = folder_paths.get_folder_paths("embeddings")
    _, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
        load.tensors(),
        output_model=False,
        embedding_directory=embeddings,
        model_options=load.options,
        metadata=load.file.metadata,
    )
    stock = (load.file.path, embeddings, {}, {})
    if clip is not None:
        clip.patcher.cached_patcher_init = (comfy.sd.load_checkpoint_clip_patcher, stock)
    if getattr(vae, "patcher", None) is not None:
        vae.patcher.cached_patcher_init = (comfy.sd.load_checkpoint_vae_patcher, stock)
    return clip, vae


def load_diffusion_model(
    file: ModelFile | str,
    how: Decider | Plan | None,
    *,
    fp8_matmul: bool = False,
    int8_matmul: bool = False,
    to_host: bool = False,
) -> ModelPatcher:
    """Load only the diffusion model of a file; otherwise as load_checkpoint."""
    file = opened(file)
    load = _Load(file, detect(file), how, to_host=to_host)
    with explained(file):
        patcher = comfy.sd.load_diffusion_model_state_dict(
            load.tensors(),
            model_options=load.options,
            metadata=file.metadata,
            disable_dynamic=True,
        )
    _complete(load, patcher, fp8_matmul, int8_matmul)
    return patcher


def _load_again(
    path: str,
    how: KnownPlan | None,
    fp8_matmul: bool = False,
    int8_matmul: bool = False,
    disable_dynamic: bool = True,
) -> ModelPatcher:
    """Load the same model once more, for a clone that needs its own weights (on another GPU).

    ComfyUI keeps this function and its arguments as `cached_patcher_init`, and expects the path as
    the first argument. It passes `disable_dynamic`, which makes no difference here.
    """
    file = ModelFile(path)
    options = {"fp8_matmul": fp8_matmul, "int8_matmul": int8_matmul, "to_host": True}
    if file.prefix:
        patcher = load_checkpoint(file, how, only_model=True, **options)[0]
    else:
        patcher = load_diffusion_model(file, how, **options)
    _unload(patcher)
    return patcher


def _unload(patcher: ModelPatcher) -> None:
    """Take a MODEL off the GPU if ComfyUI has built it there (--highvram, a large GPU).

    The clone takes its weights and drops the MODEL. ComfyUI would still list it as loaded, warn of
    a memory leak, and never unload it.
    """
    its = memory.LoadedModel(patcher)
    others = [one for one in memory.current_loaded_models if one != its]
    memory.free_memory(1e30, patcher.load_device, others)


class _Load:
    """What ComfyUI's loaders are given, so that each layer is quantized when it is loaded.

    Attributes:
        file: the file to load.
        options: ComfyUI's model_options.
        resident: whether the model is loaded onto the GPU at once and stays there.
        originals: reads the layers' 16-bit weights again when a LoRA needs them.
        quantizer: quantizes the layers; None if the file is quantized already.
        sketches: of the layers' inputs, for compensated rounding; None without it.
    """

    def __init__(
        self, file: ModelFile, structure: Structure, how: Decider | Plan | None, *, to_host: bool
    ) -> None:
        self.file = file
        if file.is_quantized != (how is None):
            state = "quantized already" if file.is_quantized else "not quantized"
            raise ModelFileError(f"{file.name} is {state}")
        self.originals = Originals(file)
        self.quantizer, self.sketches, self.resident, decide = None, None, False, _keep
        if how is not None:
            decider = decider_of(how)
            self.sketches = decider.sketches
            if decider.unknown(structure.layers):
                restrict(decider, find_layers(file), file.name)
            self.resident = not to_host and make_room(decider, structure.layers)
            count, note = len(structure.layers), self.originals.note
            self.quantizer = Quantizer(decider, count, resident=self.resident, note=note)
            decide = self.quantizer.decide
        operations = hswq_operations(
            decide, manual_cast=structure.manual_cast, originals=self.originals
        )
        self.options = {"dtype": structure.dtype, "custom_operations": operations}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the file's tensors, in a new dict: ComfyUI removes entries from it."""
        tensors = self.file.tensors
        for marker in MODEL_MARKERS:  # only the diffusion model's: text encoders need theirs
            tensors.pop(self.file.prefix + marker, None)
        return tensors


def _complete(load: _Load, patcher: ModelPatcher, fp8_matmul: bool, int8_matmul: bool) -> None:
    """Check a MODEL that ComfyUI has loaded, and add what our loaders promise of it."""
    name = load.file.name
    check_whole(name, patcher.model.diffusion_model)
    if load.quantizer is not None:
        plan = load.quantizer.finish()
        how = KnownPlan(plan, load.sketches)
        load.originals.belong_to(patcher.model, plan, load.sketches)
    else:
        plan, how = _plan_as_stored(patcher), None
    _check_quantized(name, patcher, plan)
    its = remember(patcher.model, load.file, monitored_layers(patcher.model.diffusion_model))
    adopt(patcher, plan, name, its and its.fingerprint)
    is_int8 = plan.number_format is INT8
    if int8_matmul if is_int8 else fp8_matmul:
        (multiply_in_int8 if is_int8 else multiply_in_fp8)(patcher, plan)
        logging.info("HSWQ: %s: %s", name, products(patcher, plan.number_format))
    arguments = (load.file.path, how, fp8_matmul, int8_matmul)
    patcher.cached_patcher_init = (_load_again, arguments)
    if load.resident:
        _stay_on_gpu(patcher)


def _stay_on_gpu(patcher: ModelPatcher) -> None:
    """Tell ComfyUI that a model is on the GPU.

    load_models_gpu would free memory for the whole model, which is on the GPU already.
    """
    loaded = memory.LoadedModel(patcher)
    loaded.model_load()
    memory.current_loaded_models.insert(0, loaded)


def _check_quantized(name: str, patcher: ModelPatcher, plan: Plan) -> None:
    """Refuse a model that differs from its Plan, as when ComfyUI did not use our operations."""
    layers = monitored_layers(patcher.model.diffusion_model)
    held = [layer for layer, one in layers.items() if isinstance(one.weight, QuantizedTensor)]
    if set(held) != set(plan.quantized):
        raise ModelFileError(
            f"{name} was loaded with {len(held)} quantized layers, not with {len(plan.quantized)}"
        )


def _keep(_: str, weight: torch.Tensor, __: torch.device) -> torch.Tensor:
    return weight


def _plan_as_stored(patcher: ModelPatcher) -> Plan:
    """Return a Plan that describes a model as its quantized file holds it."""
    layers, is_int8 = {}, False
    for name, layer in monitored_layers(patcher.model.diffusion_model).items():
        weight, amax = layer.weight, None
        if isinstance(weight, QuantizedTensor):
            is_int8 = is_int8 or weight._qdata.dtype is torch.int8
            largest = INT8_MAX if weight._qdata.dtype is torch.int8 else FP8_MAX
            amax = weight.params.scale.max().item() * largest
        input_amax = getattr(layer, "stored_input_amax", None)
        layers[name] = LayerPlan(name, amax, Reason.STORED, input_amax=input_amax)
    scaled = any(layer.amax not in (None, FP8_MAX) for layer in layers.values())
    return Plan(INT8 if is_int8 else fp8_format(scaled), None, MappingProxyType(layers))
