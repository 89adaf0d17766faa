"""Converting a MODEL in memory: a new one with quantized weights, the input left as it was."""

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
from .network import own_layers
from .operations import hswq_operations
from .patchers import is_quantized
from .quantizer import Quantizer, restrict

_PREFIX = "diffusion_model."


def convert(
    patcher: ModelPatcher, how: Decider | Plan, disable_dynamic: bool = False
) -> ModelPatcher:
    """Return a quantized copy of a MODEL, with its LoRAs and merges in the quantized weights.

    Args:
        patcher: 16-bit MODEL; neither it nor its clones are changed.
        how: what tells which layers are quantized, or a Plan to repeat.
        disable_dynamic: ComfyUI's, for clones without Dynamic VRAM.

    Raises:
        ValueError: the model is quantized already, has something that works on its own modules
            alone (see bound), or statistics or Plan are of another model.
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
    _load(model, weights, assign=patcher.is_dynamic())
    fresh = type(patcher)(model, patcher.load_device, patcher.offload_device)
    converted = patcher.clone(model_override=fresh.get_clone_model_override())
    _separate(converted)
    converted.patches = {
        key: patches for key, patches in patcher.patches.items() if not key.startswith(_PREFIX)
    }
    plan = quantizer.finish()
    weights.forget()
    # Without Dynamic VRAM it would keep the 16-bit weights in memory, for clones on other GPUs.
    converted.cached_patcher_init = (convert, (original, plan)) if original.is_dynamic() else None
    its = identity(original)
    adopt(converted, plan, its.name if its else type(base).__name__, its and its.fingerprint)
    return converted


class _Weights:
    """The diffusion model's weights with what is patched onto them, one at a time."""

    def __init__(self, patcher: ModelPatcher) -> None:
        self._device = memory.get_torch_device()
        layers = monitored_layers(patcher.model.diffusion_model)
        self._layers = {f"{name}.weight" for name in layers}
        self._patches = {
            key.removeprefix(_PREFIX): patches
            for key, patches in patcher.get_key_patches(_PREFIX).items()
        }

    def forget(self) -> None:
        """Let go of the 16-bit weights; the new model's operations keep this object."""
        self._patches.clear()

    def unpatched(self, key: str) -> torch.Tensor:
        weight, convert_weight = self._patches[key][0]
        # Not detach(): a parameter made in inference mode and moved outside of it has no views.
        return convert_weight(weight.data)

    def patched(self, key: str) -> torch.Tensor:
        weight = self.unpatched(key)
        patches = self._patches[key][1:]
        if not patches:
            return weight
        values = weight.to(self._device, torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches, values, _PREFIX + key)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all weights; the layers' own are patched when they load, one by one."""
        return {
            key: self.unpatched(key) if key in self._layers else self.patched(key)
            for key in self._patches
        }


def _separate(converted: ModelPatcher) -> None:
    """Take from a clone what it shares with the patcher of another model."""
    converted.size = 0  # to be measured again
    converted.parent = None  # which ComfyUI would take to be the same model, and keep
    converted.clone_base_uuid = uuid.uuid4()  # by which it takes others on other GPUs for clones
    # What hooks have patched is in the other model's weights.
    converted.hook_backup, converted.cached_hook_patches = {}, {}
    converted.current_hooks = None


def _load(model: BaseModel, weights: _Weights, *, assign: bool) -> None:
    missing, unexpected = model.diffusion_model.load_state_dict(
        weights.state_dict(), strict=False, assign=assign
    )
    if missing or unexpected:
        raise ValueError(
            f"{type(model).__name__} cannot be converted: {len(missing)} of its weights are "
            f"missing and {len(unexpected)} unknown in its copy, as {(missing + unexpected)[0]!r}"
        )


def _rebuild(source: BaseModel, operations: type) -> BaseModel:
    """Build the same model anew, with other operations and no weights yet."""
    config = object.__new__(type(source.model_config))  # it answers copy's questions with None
    config.__dict__.update(source.model_config.__dict__)
    config.unet_config = dict(config.unet_config)
    config.custom_operations = operations
    # Read from the checkpoint's keys when it was loaded; they are gone now.
    model_type = source.model_type
    config.model_type = lambda *_: model_type
    model = config.get_model({}, "", device=memory.unet_offload_device())
    model.model_sampling = copy.deepcopy(source.model_sampling)
    return model
