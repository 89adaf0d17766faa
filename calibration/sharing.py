"""Which layers of a model are given the same input: they need only one sketch between them."""

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
    """Which layer owns each input, and which layers share it. It is learned as they are called.

    Layers share an input if their first calls are given the same tensor object. Equal addresses
    would not do, because the memory of one activation is used again for the next. A tensor may also
    be changed in place between two calls. Inference tensors have no version that would show it, so
    a few values are copied at each call, and `settle` compares them.
    """

    def __init__(self) -> None:
        """Start without any layers."""
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
        """Return the first called of the layers that share this layer's input."""
        return self._owners.get(layer, layer)

    def settle(self) -> None:
        """Compare the copied values; a layer whose tensor had changed owns its input.

        It waits for the device, and releases all that was kept.
        """
        unproven, self._unproven = self._unproven, []
        self._inputs = {}
        for layer, first, second in unproven:
            if not torch.equal(first, second):
                self._owners[layer] = layer


_of_models: weakref.WeakKeyDictionary[torch.nn.Module, Sharing] = weakref.WeakKeyDictionary()


def sharing_of(model: torch.nn.Module) -> Sharing:
    """Return a model's Sharing. It is learned once, since the model's structure does not change."""
    return _of_models.setdefault(model, Sharing())


def _probe(inputs: torch.Tensor) -> torch.Tensor:
    """Return a copy of some values, spread over a tensor's memory."""
    values = inputs.detach()
    offset = values.storage_offset()
    extent = 1 + sum((n - 1) * step for n, step in zip(values.shape, values.stride(), strict=True))
    count = min(_PROBED, extent)
    # By strides over the memory, because flattening may copy the whole tensor.
    return values.as_strided((count,), (extent // count,), offset).clone()
