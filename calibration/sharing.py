"""Which layers of a model are given the very same input: those need one sketch between them."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

_PROBED = 32  # values, to notice that an input was changed in place


class _Input(NamedTuple):
    tensor: weakref.ref
    layer: str
    probe: torch.Tensor


class Sharing:
    """Who of a model's layers owns an input, and who shares it; learned as they are called.

    Layers share an input where they are first called with the same tensor object. Its address says
    less: an activation's memory is given to the next one when it is gone. Inference tensors have no
    version that shows a change in place, so a few values are kept until `settle` compares them.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self._owners: dict[str, str] = {}
        self._inputs: dict[int, _Input] = {}
        self._unproven: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def __contains__(self, layer: str) -> bool:
        return layer in self._owners

    def learn(self, layer: str, inputs: torch.Tensor) -> None:
        """Take the input of a layer's first call, a tensor of at least one value."""
        if layer in self._owners:
            return
        known, probe = self._inputs.get(id(inputs)), _probe(inputs)
        if known is not None and known.tensor() is inputs:
            self._owners[layer] = known.layer
            self._unproven.append((layer, known.probe, probe))
        else:
            self._owners[layer] = layer
            self._inputs[id(inputs)] = _Input(weakref.ref(inputs), layer, probe)

    def owner(self, layer: str) -> str:
        """Return the layer, of those with the same input, that is called first."""
        return self._owners.get(layer, layer)

    def settle(self) -> None:
        """Let go of what was kept; who was given a changed tensor owns its input. Waits for it."""
        unproven, self._unproven = self._unproven, []
        self._inputs = {}
        for layer, first, second in unproven:
            if not torch.equal(first, second):
                self._owners[layer] = layer


_of_models: weakref.WeakKeyDictionary[torch.nn.Module, Sharing] = weakref.WeakKeyDictionary()


def sharing_of(model: torch.nn.Module) -> Sharing:
    """Return what is known of a model; its structure does not change, so it is learned once."""
    return _of_models.setdefault(model, Sharing())


def _probe(inputs: torch.Tensor) -> torch.Tensor:
    """Return a copy of some values, spread over a tensor's memory."""
    values = inputs.detach()
    offset = values.storage_offset()
    extent = 1 + sum((n - 1) * step for n, step in zip(values.shape, values.stride(), strict=True))
    count = min(_PROBED, extent)
    return values.as_strided((count,), (extent // count,), offset).clone()
