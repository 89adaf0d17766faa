"""Running sums of a model's layers, on the devices where the layers run.

All layers of a device share one buffer that is allocated at the start: memory does not grow while
a model samples, and all sums are read back in one transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from . import kernels
from .statistics import LayerStatistics

_MOMENTS = kernels.MOMENTS * kernels.SLOTS


class LayerSums:
    """One layer's sums on one device."""

    def __init__(self, moments: torch.Tensor, importance: torch.Tensor) -> None:
        """Take (SLOTS, MOMENTS) and (channels,) float64 zeros; see kernels.add_call."""
        self.calls = 0
        self.moments = moments
        self.importance = importance
        self._triton = kernels.usable(moments.device)

    def add(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Add one call.

        Raises:
            ValueError: the input has another number of channels than earlier ones.
        """
        channels, before = input_channels(inputs), self.importance.numel()
        if channels != before:
            raise ValueError(f"it had {before} input channels, now {channels}")
        if not (self._triton and self._add_in_one_launch(inputs, output)):
            self._add_with_torch(inputs, output)
        self.calls += 1

    def _add_with_torch(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
        importance, amax = input_magnitudes(inputs)
        totals = self.moments[0]
        totals[:2] += output_moments(output)
        torch.maximum(totals[2], amax, out=totals[2])
        self.importance += importance

    def _add_in_one_launch(self, inputs: torch.Tensor, output: torch.Tensor) -> bool:
        """Add with the kernel; return False if it does not know the tensors' layout in memory."""
        lies = kernels.matrix_of(inputs)
        if lies is None or not kernels.is_flat(output) or inputs.device != output.device:
            return False
        kernels.add_call(self.moments, self.importance, output, inputs, lies)
        return True


class DeviceSums:
    """Sums of all layers on one device."""

    def __init__(self, channels: Mapping[str, int], device: torch.device) -> None:
        """Allocate sums for layers; `channels` has their numbers of input channels by name."""
        self._channels = channels
        self._buffer = _zeros(len(channels) * _MOMENTS + sum(channels.values()), device)
        with torch.inference_mode(False), torch.no_grad():
            parts = zip(channels, self._parts(self._buffer), strict=True)
            self._layers = {name: LayerSums(*sums) for name, sums in parts}
        self._other: set[str] = set()  # layers whose inputs have other channels than they say

    def _parts(self, buffer: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Return views of the buffer: every layer's moments and importance."""
        count = len(self._channels)
        moments = buffer[: count * _MOMENTS].view(count, kernels.SLOTS, kernels.MOMENTS)
        importances = buffer[count * _MOMENTS :]
        return zip(moments, importances.split(list(self._channels.values())), strict=True)

    def add(self, name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Add one call of a layer."""
        layer = self._layers[name]
        if not layer.calls and input_channels(inputs) != self._channels[name]:
            channels = input_channels(inputs)
            sums = _zeros(_MOMENTS + channels, self._buffer.device)
            layer = LayerSums(sums[:_MOMENTS].view(-1, kernels.MOMENTS), sums[_MOMENTS:])
            self._layers[name] = layer
            self._other.add(name)
        layer.add(inputs, output)

    def read(self) -> dict[str, LayerStatistics]:
        """Return the sums of all layers that were called, in one transfer."""
        buffer = self._buffer.to("cpu", copy=True)
        found = {}
        for (name, layer), (moments, importance) in zip(
            self._layers.items(), self._parts(buffer), strict=True
        ):
            if name in self._other:
                moments, importance = layer.moments.cpu(), layer.importance.cpu()
            if layer.calls:
                mean, square, _ = moments.sum(0).tolist()
                amax = moments[:, 2].amax().item()
                calls = layer.calls
                # A view would keep the sums of all layers, even if only a few were called.
                found[name] = LayerStatistics(mean, square, calls, importance.clone(), calls, amax)
        return found


def _zeros(size: int, device: torch.device) -> torch.Tensor:
    """Return float64 zeros that can be changed inside and outside of inference mode."""
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.float64, device=device)


def input_channels(inputs: torch.Tensor) -> int:
    """Return how many values a layer's importance has.

    It is the size of axis 1 for a 4-D input, of the last axis for a 3-D or 2-D one, else 1.
    """
    if inputs.ndim == 4:
        return inputs.shape[1]
    return inputs.shape[-1] if inputs.ndim in (2, 3) else 1


def output_moments(output: torch.Tensor) -> torch.Tensor:
    """Return (2,) FP32: mean(Y) and mean(Y^2) over all elements."""
    values = output.detach()
    mean = values.mean(dtype=torch.float32)
    if values.is_cuda:  # a norm takes one launch; squares and their mean take two
        norm = torch.linalg.vector_norm(values, dtype=torch.float32)
        return torch.stack((mean, norm * norm / values.numel()))
    return torch.stack((mean, values.to(torch.float32).square().mean()))


def input_magnitudes(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (channels,) FP32, the mean |x| of each channel; and the largest |x|, a scalar.

    The channel is axis 1 of a 4-D input, and the last axis of a 3-D or 2-D one. Any other input
    has a single mean, which is 1.
    """
    values = inputs.detach()
    axes = {4: (0, 2, 3), 3: (0, 1), 2: (0,)}.get(values.ndim)
    values = values if values.is_cuda else values.abs()  # on a GPU, norms need no copy
    if axes is None:
        means = torch.ones(1, device=values.device)
    elif values.is_cuda:
        sums = torch.linalg.vector_norm(values, 1, axes, dtype=torch.float32)
        means = sums / (values.numel() / max(1, sums.numel()))
    else:
        means = values.mean(axes, dtype=torch.float32)
    if not values.numel():
        return means, torch.zeros((), device=values.device)
    return means, torch.linalg.vector_norm(values, torch.inf, dtype=torch.float32)
