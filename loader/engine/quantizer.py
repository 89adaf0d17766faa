"""Deciding about a model's layers and quantizing them on the GPU, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import comfy.model_management as memory
import comfy.utils
import torch

from ...quant import INT8, Decider, NumberFormat, Plan, stored
from . import ahead
from .transfer import moved, transfer_of

WORK_BYTES = 512 << 20
"""GPU memory to free for searching one layer."""


def has_numbers(device: torch.device, number_format: NumberFormat) -> bool:
    """Whether a device can hold and decode a format: Apple's GPUs and DirectML have no FP8."""
    dtype = number_format.dtype
    return not dtype.is_floating_point or memory.supports_cast(device, dtype)


def quantizing_device(number_format: NumberFormat) -> torch.device:
    """Return the device that quantizes and computes.

    Raises:
        ValueError: it does not have the format's numbers.
    """
    device = memory.get_torch_device()
    if not has_numbers(device, number_format):
        raise ValueError(
            f"{device} has no {number_format.title}: choose the mode {INT8.name}, "
            "which every device can"
        )
    return device


class _Refined(NamedTuple):
    """A layer from an earlier load that was given away before it was known to be right.

    Attributes:
        name: of the layer.
        weight: the 16-bit weight, by which it can be made again.
        data: stored weight.
        scale: its weight_scale.
        is_right: bool scalar tensor.
    """

    name: str
    weight: torch.Tensor
    data: torch.Tensor
    scale: torch.Tensor
    is_right: torch.Tensor


class Quantizer:
    """Takes a model's layers one at a time, in the model's order.

    A search calls `search` for each layer, an export calls `quantize`, and ComfyUI's loaders call
    `decide` (see operations). Each call moves the weight to the GPU if that is needed, shows
    progress, and stops when the user interrupts.
    """

    def __init__(
        self,
        decider: Decider,
        layers: int = 0,
        *,
        resident: bool = False,
        note: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        """Free memory for the search. What is being prepared for it is waited for (see ahead).

        Args:
            decider: decides about each layer.
            layers: number of layers, for the progress bar; 0 shows none.
            resident: `decide` leaves all layers on the GPU, and not where ComfyUI builds the model.
            note: `decide` calls it with each quantized layer's name, bytes and scale. They are
                still on the device that quantized them, where a checksum takes little time.

        Raises:
            ValueError: the device does not have the number format.
        """
        self._decider: Decider | None = decider
        self._resident, self._note = resident, note
        self._transfer = transfer_of(quantizing_device(decider.number_format))
        self._unchecked: list[_Refined] = []
        ahead.wait()
        self._progress = comfy.utils.ProgressBar(layers) if layers else None
        memory.free_memory(WORK_BYTES, self._transfer.device)

    def search(self, name: str, weight: torch.Tensor) -> None:
        """Decide about a layer without quantizing it."""
        self._begin()
        searched = self._decider.searches(name)
        self._decider.clipping_of(name, self._transfer.up(weight) if searched else weight)

    def quantize(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Decide about a layer; return its bytes and weight_scale on the GPU; None keeps it."""
        return self._quantized(name, weight, self._refined(name, weight, checked=True))

    def decide(
        self, name: str, weight: torch.Tensor, device: torch.device
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's weight to keep, or its bytes and weight_scale. `finish` completes them.

        `device` is where ComfyUI builds the layer. Unless resident, the result is there.
        """
        transfer = self._transfer
        # Later would be too late for what is mapped from the file, or what ComfyUI may move then.
        checked = not self._resident and (device.type != "cpu" or transfer.device.type == "cpu")
        parts = self._quantized(name, weight, self._refined(name, weight, checked=checked))
        if parts is None:
            # A weight that is converted may be on the GPU, where ComfyUI would not count this one.
            return transfer.up(weight) if self._resident else moved(weight, device)
        data, scale, *unchecked = parts
        if self._note is not None:
            self._note(name, data, scale)
        if not self._resident:
            data, scale = (transfer.place_soon(part, device) for part in (data, scale))
        if unchecked:
            self._unchecked.append(_Refined(name, weight, data, scale, *unchecked))
        return data, scale

    def _quantized(
        self, name: str, weight: torch.Tensor, refined: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, ...] | None:
        """Decide about a layer; return what an earlier load made of it, or quantize it."""
        if refined is not None or not self._decider.quantizes(name):
            self.search(name, weight)
            return refined
        self._begin()
        return stored(self._decider, name, self._transfer.up(weight))

    def finish(self) -> Plan:
        """Return the Plan, and release pinned memory and statistics.

        All that was decided about is complete then. Layers of an earlier load that were damaged are
        made again where they are.

        Raises:
            ValueError: the statistics or the Plan belong to another model.
        """
        self._transfer.finish()
        self._mend()
        decider, self._decider = self._decider, None
        return decider.finish()

    def _begin(self) -> None:
        memory.throw_exception_if_processing_interrupted()
        if self._progress is not None:
            self._progress.update(1)

    def _refined(
        self, name: str, weight: torch.Tensor, *, checked: bool
    ) -> tuple[torch.Tensor, ...] | None:
        """Return a layer's quantized weight from an earlier load, on the device; else None.

        Unless `checked`, a third tensor says whether the others are right. It is looked at when all
        layers are there: asking each would let the file and the GPU wait for each other 800 times.
        """
        kept = self._decider.refined
        if kept is None:
            return None
        found = (kept.read if checked else kept.read_unchecked)(name, self._transfer.up)
        expected = weight.shape, self._decider.number_format.dtype
        return found if found and (found[0].shape, found[0].dtype) == expected else None

    def _mend(self) -> None:
        """Make layers again, in place, that came damaged from the file of an earlier load."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        right = torch.stack([one.is_right for one in unchecked]).tolist()
        for (name, weight, data, scale, _), is_right in zip(unchecked, right, strict=True):
            if is_right:
                continue
            self._decider.refined.reject(name)
            made, its_scale = stored(self._decider, name, weight.to(self._transfer.device))
            data.copy_(made)
            scale.copy_(its_scale)
            if self._note is not None:
                self._note(name, data, scale)


def restrict(decider: Decider, layers: Collection[str], name: str) -> None:
    """Leave out statistics of layers that a node had added to the model, and say so in the log.

    Args:
        decider: whose statistics are restricted.
        layers: names of the model's own Linear and Conv2d layers.
        name: of the model, for the log.
    """
    left_out = decider.restrict(layers)
    if left_out:
        logging.warning(
            "HSWQ: %s: its statistics name %d layers that it does not have, such as %s; "
            "they are left out", name, len(left_out), left_out[0]
        )  # fmt: skip


def make_room(decider: Decider, layers: Mapping[str, int]) -> bool:
    """Free GPU memory for a quantized model; return whether it can be loaded there at once.

    Such a model need not go through host memory.

    Args:
        decider: says which layers will be quantized.
        layers: number of weights of each layer by name.
    """
    device = memory.get_torch_device()
    if device.type != "cuda":
        return False
    if memory.vram_state in (memory.VRAMState.NO_VRAM, memory.VRAMState.LOW_VRAM):
        return False
    size = sum(count * (1 if decider.quantizes(name) else 2) for name, count in layers.items())
    # Searching is over when sampling begins, so only the larger of both counts. ComfyUI, too, keeps
    # a model of this size whole on the GPU.
    needed = 1.05 * size + max(WORK_BYTES, memory.minimum_inference_memory())
    if needed > memory.get_total_memory(device):
        return False
    memory.free_memory(needed, device)
    return memory.get_free_memory(device) > needed
