"""Running sums of a model's layers, on the devices where they run.

All layers of a device share one buffer that is made at once: nothing grows while a model samples,
and the sums come back in one transfer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import kernels
from .statistics import LayerStatistics

_MOMENTS = 2 * kernels.SLOTS


class LayerSums:
    """Where one layer's sums are on one device."""

    def __init__(self, buffer: torch.Tensor, offset: int, channels: int) -> None:
        """Take the float64 buffer, and where in it the layer's part begins."""
        self.channels = channels
        self.calls = 0
        self._buffer = buffer
        self._offset = offset
        self._moments = buffer[offset : offset + 2]
        self._importance = buffer[offset + _MOMENTS : offset + _MOMENTS + channels]
        self._triton = kernels.usable(buffer.device)

    def add(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Add one call; see kernels.add_call for what is added.

        Raises:
            ValueError: the input has other channels than those before.
        """
        channels = input_channels(inputs)
        if channels != self.channels:
            raise ValueError(f"it had {self.channels} input channels, now {channels}")
        if not (self._triton and self._add_in_one_launch(inputs, output)):
            self._moments += output_moments(output)
            self._importance += input_importance(inputs)
        self.calls += 1

    def read(self, buffer: torch.Tensor) -> LayerStatistics:
        """Return the sums; `buffer` is a CPU copy of the one that they are in."""
        end = self._offset + _MOMENTS
        total, squares = buffer[self._offset : end].view(-1, 2).sum(0).tolist()
        importance = buffer[end : end + self.channels].clone()
        return LayerStatistics(total, squares, self.calls, importance, self.calls)

    def _add_in_one_launch(self, inputs: torch.Tensor, output: torch.Tensor) -> bool:
        """Return whether the kernel knows how these tensors lie in memory."""
        lies = kernels.matrix_of(inputs)
        if lies is None or not kernels.is_flat(output) or inputs.device != output.device:
            return False
        kernels.add_call(self._buffer, self._offset, output, inputs, lies)
        return True


class DeviceSums:
    """Sums of all layers on one device."""

    def __init__(self, channels: Mapping[str, int], device: torch.device) -> None:
        """Make room for layers of so many input channels."""
        self._channels = channels
        self._offsets, size = {}, 0
        for name, count in channels.items():
            self._offsets[name] = size
            size += _MOMENTS + count
        self._buffer = _zeros(size, device)
        self._layers: dict[str, LayerSums] = {}
        self._others: dict[str, torch.Tensor] = {}  # of layers whose input is not what they say

    def add(self, name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Add one call of a layer."""
        layer = self._layers.get(name)
        if layer is None:
            layer = self._layers[name] = self._begin(name, input_channels(inputs))
        layer.add(inputs, output)

    def _begin(self, name: str, channels: int) -> LayerSums:
        with torch.inference_mode(False), torch.no_grad():
            if channels == self._channels[name]:
                return LayerSums(self._buffer, self._offsets[name], channels)
            self._others[name] = _zeros(_MOMENTS + channels, self._buffer.device)
            return LayerSums(self._others[name], 0, channels)

    def read(self) -> dict[str, LayerStatistics]:
        """Return the sums of all layers that were called, in one transfer."""
        buffer = self._buffer.to("cpu", copy=True)
        others = {name: sums.to("cpu", copy=True) for name, sums in self._others.items()}
        return {
            name: layer.read(others.get(name, buffer))
            for name, layer in self._layers.items()
            if layer.calls
        }


def _zeros(size: int, device: torch.device) -> torch.Tensor:
    """Return zeros that can be added to in any of torch's modes."""
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.float64, device=device)


def input_channels(inputs: torch.Tensor) -> int:
    """Return how many values a layer's importance has: axis 1 of a 4-D input, the last one's of
    a 3-D or 2-D input, 1 for any other."""
    if inputs.ndim == 4:
        return inputs.shape[1]
    return inputs.shape[-1] if inputs.ndim in (2, 3) else 1


def output_moments(output: torch.Tensor) -> torch.Tensor:
    """Return (2,) FP32: mean(Y) and mean(Y^2) over all elements."""
    values = output.detach()
    mean = values.mean(dtype=torch.float32)
    if values.is_cuda:  # in one launch
        norm = torch.linalg.vector_norm(values, dtype=torch.float32)
        return torch.stack((mean, norm * norm / values.numel()))
    return torch.stack((mean, values.to(torch.float32).square().mean()))


def input_importance(inputs: torch.Tensor) -> torch.Tensor:
    """Return (channels,) FP32: mean |x| over every axis but the channel.

    The channel is axis 1 of a 4-D input and the last axis of a 3-D or 2-D one; any other input
    gives the single value 1.
    """
    axes = {4: (0, 2, 3), 3: (0, 1), 2: (0,)}.get(inputs.ndim)
    if axes is None:
        return torch.ones(1, device=inputs.device)
    values = inputs.detach()
    if values.is_cuda:
        norm = torch.linalg.vector_norm(values, 1, axes, dtype=torch.float32)
        return norm / (values.numel() / max(1, norm.numel()))
    return values.abs().mean(axes, dtype=torch.float32)
