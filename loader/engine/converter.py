"""Converting a MODEL in memory: it makes a new quantized MODEL and leaves the input unchanged."""

from __future__ import annotations

import copy
import uuid

import comfy.lora
import comfy.model_management as memory
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ...calibration import monitored_layers
from ...quant import Decider, Plan, decider_of
from .adopt import adopt
from .bound import as_built, check_free
from .identity import identity
from .network import PREFIX, own_layers
from .operations import hswq_operations
from .patchers import is_quantized
from .quantizer import Quantizer, restrict

_PREFIX = f"{PREFIX}."


def convert(
    patcher: ModelPatcher, how: Decider | Plan, disable_dynamic: bool = False
) -> ModelPatcher:
    """Return a quantized copy of a MODEL. Its LoRAs and merges become part of the weights.

    Args:
        patcher: 16-bit MODEL; neither it nor its clones are changed.
        how: decides about each layer; or a Plan to repeat.
        disable_dynamic: ComfyUI's argument, for clones without Dynamic VRAM.

    Raises:
        ValueError: the model is quantized already, another node has added something that works
            only on its own modules (see bound), or the statistics or the Plan are of another model.
    """
    check_free(patcher)
    original = patcher
    patcher = patcher.clone(disable_dynamic=True) if disable_dynamic else patcher
    with as_built(patcher):
        return _convert(original, patcher, decider_of(how))


def _convert(original: ModelPatcher, patcher: ModelPatcher, decider: Decider) -> ModelPatcher:
    if is_quantized(patcher):
        raise ValueError("this model is quantized already: HSWQ needs its 16-bit weights")
    base = patcher.model
    layers = own_layers(original)
    restrict(decider, layers, type(base).__name__)
    quantizer = Quantizer(decider, len(layers))
    weights = _Weights(patcher)
    operations = hswq_operations(
        lambda name, _, device: quantizer.decide(name, weights.patched(f"{name}.weight"), device),
        manual_cast=base.manual_cast_dtype not in (None, base.get_dtype()),
    )
    model = _rebuild(base, operations)
    # As ComfyUI's loaders do: under Dynamic VRAM a model takes the given tensors as they are.
    _load(model, weights, assign=patcher.is_dynamic())
    fresh = type(patcher)(model, patcher.load_device, patcher.offload_device)
    converted = patcher.clone(model_override=fresh.get_clone_model_override())
    _separate(converted)
    # Patches of the diffusion model are in its weights now. Others stay.
    converted.patches = {
        key: patches for key, patches in patcher.patches.items() if not key.startswith(_PREFIX)
    }
    plan = quantizer.finish()
    weights.forget()
    # ComfyUI makes clones for other GPUs with this. Without Dynamic VRAM it would keep the 16-bit
    # weights in memory.
    converted.cached_patcher_init = (convert, (original, plan)) if original.is_dynamic() else None
    its = identity(original)
    adopt(converted, plan, its.name if its else type(base).__name__, its and its.fingerprint)
    return converted


class _Weights:
    """The diffusion model's weights with their patches (LoRAs, merges), computed one at a time."""

    def __init__(self, patcher: ModelPatcher) -> None:
        self._device = memory.get_torch_device()
        layers = monitored_layers(patcher.model.diffusion_model)
        self._layers = {f"{name}.weight" for name in layers}
        self._patches = {
            key.removeprefix(_PREFIX): patches
            for key, patches in patcher.get_key_patches(_PREFIX).items()
        }

    def forget(self) -> None:
        """Release the 16-bit weights. The new model's operations would keep them in memory."""
        self._patches.clear()

    def unpatched(self, key: str) -> torch.Tensor:
        weight, convert_weight = self._patches[key][0]
        # `.data`, since detach() fails for a parameter made in inference mode and moved outside it.
        return convert_weight(weight.data)

    def patched(self, key: str) -> torch.Tensor:
        weight = self.unpatched(key)
        patches = self._patches[key][1:]
        if not patches:
            return weight
        values = weight.to(self._device, torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches, values, _PREFIX + key)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all weights. Those of the layers are not patched yet: that is done on loading."""
        return {
            key: self.unpatched(key) if key in self._layers else self.patched(key)
            for key in self._patches
        }


def _separate(converted: ModelPatcher) -> None:
    """Reset state that the clone took over from a patcher of a different model."""
    converted.size = 0  # ComfyUI measures it again
    converted.parent = None  # ComfyUI would keep the parent, and take it for the same model
    converted.clone_base_uuid = uuid.uuid4()  # ComfyUI finds clones on other GPUs by it
    # The backups of hooked weights are those of the other model.
    converted.hook_backup, converted.cached_hook_patches = {}, {}
    converted.current_hooks = None


def _load(model: BaseModel, weights: _Weights, *, assign: bool) -> None:
    missing, unexpected = model.diffusion_model.load_state_dict(
        weights.state_dict(), strict=False, assign=assign
    )
    if missing or unexpected:
        raise ValueError(
            f"{type(model).__name__} cannot be converted: its copy lacks {len(missing)} weights "
            f"and does not know {len(unexpected)}, such as {(missing + unexpected)[0]!r}"
        )


def _rebuild(source: BaseModel, operations: type) -> BaseModel:
    """Build the same model again, with other operations and without weights."""
    # Not copy.copy: the class returns None for every attribute that it lacks, which breaks copy.
    config = object.__new__(type(source.model_config))
    config.__dict__.update(source.model_config.__dict__)
    config.unet_config = dict(config.unet_config)
    config.custom_operations = operations
    # ComfyUI derives it from the checkpoint's keys, which are not there any more.
    model_type = source.model_type
    config.model_type = lambda *_: model_type
    model = config.get_model({}, "", device=memory.unet_offload_device())
    model.model_sampling = copy.deepcopy(source.model_sampling)
    return model
