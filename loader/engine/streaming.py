"""Which layers stay on a GPU that cannot hold all, and which come from the host in each step."""

from __future__ import annotations

import functools

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

LARGEST_STREAMED = 32 << 20
"""Bytes of a layer. What is larger stays: ComfyUI reserves three times the largest that streams."""

_KEY = "hswq"


class LoadOrder(list):
    """ComfyUI's list of the modules to load, sorted so that the small ones stay on the GPU.

    ComfyUI keeps the largest there, and hundreds of small ones stream. Each costs the CPU about
    half a millisecond a step, as a large one does, while the bus waits (`bench small`). So the
    small ones stay, and few large ones stream. Of some with the same size, those that stream are
    spread evenly over the network.
    """

    def __init__(self, modules: list[tuple], *, first_is_kept: bool) -> None:
        """Take the modules in the order of the network.

        Args:
            modules: tuples that end in bytes, name, module, parameters.
            first_is_kept: ComfyUI keeps what it sorts to the front, else to the back.
        """
        super().__init__(modules)
        self._places = {name: _reversed_bits(at) for at, (*_, name, _, _) in enumerate(modules)}
        self._first_is_kept = first_is_kept

    def sort(self, *, reverse: bool = False) -> None:
        """Sort by what shall rather stay on the GPU; `reverse` is ComfyUI's."""
        super().sort(key=self._worth_keeping, reverse=reverse != self._first_is_kept)

    def _worth_keeping(self, entry: tuple) -> tuple[bool, int, int]:
        *_, size, name, _, _ = entry
        return size > LARGEST_STREAMED, -size, self._places[name]


class _StreamsLargeLayers:
    """What is added to a ModelPatcher's class."""

    def _load_list(self, *args, for_dynamic: bool = False, **kwargs) -> LoadOrder:
        modules = super()._load_list(*args, for_dynamic=for_dynamic, **kwargs)
        return LoadOrder(modules, first_is_kept=for_dynamic)


def stream_large_layers(patcher: ModelPatcher) -> None:
    """Let a MODEL and its clones stream few large layers where the GPU cannot hold all."""
    if not isinstance(patcher, _StreamsLargeLayers):
        _change_class(patcher, patcher)
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, _change_class)


def _change_class(_: ModelPatcher, patcher: ModelPatcher) -> None:
    """Change the class of a patcher; a clone without Dynamic VRAM comes with ComfyUI's own."""
    if not isinstance(patcher, _StreamsLargeLayers):
        patcher.__class__ = _with_order(type(patcher))


@functools.cache
def _with_order(kind: type[ModelPatcher]) -> type[ModelPatcher]:
    return type(kind.__name__, (_StreamsLargeLayers, kind), {})


def _reversed_bits(number: int) -> int:
    """Return a number whose order halves what lies between the ones before (van der Corput)."""
    return int(f"{number:016b}"[::-1], 2)
