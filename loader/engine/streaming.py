"""Which layers stay on a GPU that cannot hold all of them, and which are streamed in each step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import comfy.model_management as memory
from comfy.model_base import BaseModel
from comfy.model_patcher import LowVramPatch, ModelPatcher
from comfy.patcher_extension import CallbacksMP

from .patching import PatchesOnGpu

LARGEST_STREAMED = 32 << 20
"""Bytes of the largest layer that may be streamed: ComfyUI reserves three times as much for it."""

_KEY = "hswq"


class LoadOrder(list):
    """ComfyUI's list of the modules to load, sorted so that the small ones stay on the GPU.

    ComfyUI keeps the largest ones there, and streams hundreds of small ones. Streaming a small one
    costs the CPU as much as a large one, about half a millisecond a step, while the bus waits
    (`bench small`). So the small ones stay, and a few large ones are streamed. If only some of the
    same size are streamed, those are spread evenly over the network.
    """

    def __init__(self, modules: Iterable[tuple], *, first_is_kept: bool) -> None:
        """Take the modules in the order of the network.

        Args:
            modules: tuples that end in bytes, name, module, parameters.
            first_is_kept: whether ComfyUI keeps the front of the sorted list, and not its back.
        """
        super().__init__(modules)
        self._places = {name: _reversed_bits(at) for at, (*_, name, _, _) in enumerate(self)}
        self._first_is_kept = first_is_kept

    def sort(self, *, reverse: bool = False) -> None:
        """Sort by how much a module is worth keeping on the GPU; `reverse` is set by ComfyUI."""
        super().sort(key=self._worth_keeping, reverse=reverse != self._first_is_kept)

    def _worth_keeping(self, entry: tuple) -> tuple[bool, int, int]:
        *_, size, name, _, _ = entry
        return size > LARGEST_STREAMED, -size, self._places[name]


class _StreamsLargeLayers(PatchesOnGpu):
    """Is added to the class of a ModelPatcher, for what it streams."""

    def _load_list(self, *args, for_dynamic: bool = False, **kwargs) -> LoadOrder:
        modules = super()._load_list(*args, for_dynamic=for_dynamic, **kwargs)
        return LoadOrder(map(_without_weights, modules), first_is_kept=for_dynamic)

    def patch_hooks(self, *args, **kwargs) -> None:
        self._await_streamed()
        super().patch_hooks(*args, **kwargs)

    def unpatch_hooks(self, *args, **kwargs) -> None:
        if self.hook_backup:
            self._await_streamed()
        super().unpatch_hooks(*args, **kwargs)

    def _await_streamed(self) -> None:
        """Wait for layers that the GPU may still copy from pinned memory, for a step before.

        ComfyUI overwrites them there for hooks, and does not wait.
        """
        if self.model.model_lowvram:
            memory.synchronize()

    def load(self, *args, **kwargs) -> None:
        super().load(*args, **kwargs)
        if not self.force_cast_weights:
            _keep_what_was_loaded(self.model)


def _without_weights(entry: tuple) -> tuple:
    """Return a module's entry of a load list, which shall not hold the module's weights.

    What is replaced or moved would else stay on the GPU until the last module is. ComfyUI needs the
    weights' names, and what is on torch's "meta" device, to give it memory.
    """
    *others, weights = entry
    held = {name: weight if weight.is_meta else None for name, weight in weights.items()}
    return *others, held


def _keep_what_was_loaded(model: BaseModel) -> None:
    """Let layers stay on the GPU that were there before ComfyUI loaded more.

    ComfyUI does so before each sampling, and forgets what it has reserved for streaming: each time
    a few layers fit no more. Their weights stay where they are, LoRA and all, but it marks them as
    streamed, so that the LoRA would be added a second time.
    """
    for layer in model.modules():
        is_loaded = getattr(layer, "comfy_patched_weights", False)
        if is_loaded and hasattr(layer, "prev_comfy_cast_weights"):
            layer.comfy_cast_weights = layer.prev_comfy_cast_weights
            del layer.prev_comfy_cast_weights
            layer.weight_function = _without_patches(layer.weight_function)
            layer.bias_function = _without_patches(layer.bias_function)
            model.model_loaded_weight_memory += memory.module_size(layer)


def _without_patches(functions: list[Callable]) -> list[Callable]:
    return [one for one in functions if not isinstance(one, LowVramPatch)]


def stream_large_layers(patcher: ModelPatcher) -> None:
    """Let a MODEL and its clones stream a few large layers if the GPU cannot hold all of them.

    Patches (LoRAs) are applied without gaps in the GPU's memory, too (see patching).
    """
    if not isinstance(patcher, _StreamsLargeLayers):
        _change_class(patcher, patcher)
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, _change_class)


def _change_class(_: ModelPatcher, patcher: ModelPatcher) -> None:
    """Change a patcher's class. ComfyUI calls this with a MODEL and a clone that it has made.

    A clone without Dynamic VRAM has ComfyUI's own class until then.
    """
    if not isinstance(patcher, _StreamsLargeLayers):
        patcher.__class__ = _with_order(type(patcher))


@functools.cache
def _with_order(kind: type[ModelPatcher]) -> type[ModelPatcher]:
    return type(kind.__name__, (_StreamsLargeLayers, kind), {})


def _reversed_bits(number: int) -> int:
    """Return a sort key that spreads numbers evenly, however few are taken (van der Corput)."""
    return int(f"{number:016b}"[::-1], 2)
