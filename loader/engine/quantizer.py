"""Quantizing layer after layer while ComfyUI loads a model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import comfy.model_management as memory
import comfy.utils
import torch

from ...quant import Decider, Plan, stored
from .transfer import Transfer

WORK_BYTES = 512 << 20
"""GPU memory to free for searching one layer."""


def quantizing_device() -> torch.device:
    """Return the device that quantizes and computes.

    Raises:
        ValueError: it has no FP8, as is so for Apple's GPUs and DirectML.
    """
    device = memory.get_torch_device()
    if not memory.supports_cast(device, torch.float8_e4m3fn):
        raise ValueError(f"HSWQ needs a device that knows FP8, and {device} does not")
    return device


class Quantizer:
    """Decides and quantizes one layer at a time on the GPU (see operations)."""

    def __init__(self, decider: Decider, layers: int, *, resident: bool = False) -> None:
        """Free memory for the search.

        Args:
            decider: decides about each layer.
            layers: how many layers there are, for the progress bar.
            resident: leave all layers on the GPU; else each goes where ComfyUI builds the model.

        Raises:
            ValueError: the device has no FP8.
        """
        self._decider: Decider | None = decider
        self._resident = resident
        self._transfer = Transfer(quantizing_device())
        self._progress = comfy.utils.ProgressBar(layers)
        memory.free_memory(WORK_BYTES, self._transfer.device)

    def decide(
        self, name: str, weight: torch.Tensor, device: torch.device
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's weight to keep, or its FP8 bytes and weight_scale, copied completely.

        `device` is where ComfyUI builds the layer. Unless resident, the result is there.
        """
        memory.throw_exception_if_processing_interrupted()
        self._progress.update(1)
        decider, transfer = self._decider, self._transfer
        if not decider.quantizes(name):
            decider.amax_of(name, weight)
            return transfer.up(weight) if self._resident else weight
        parts = self._refined(name, weight) or stored(decider, name, transfer.up(weight))
        return parts if self._resident else tuple(transfer.place(part, device) for part in parts)

    def _refined(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Return a layer's quantized weight from an earlier load, on the device; else None."""
        found = None if self._decider.refined is None else self._decider.refined.get(name)
        if found is None or found[0].shape != weight.shape:
            return None
        self._decider.amax_of(name, weight)
        return tuple(map(self._transfer.up, found))

    def finish(self) -> Plan:
        """Return the Plan, and release pinned memory and statistics.

        Raises:
            ValueError: the statistics or the Plan belong to another model.
        """
        self._transfer.finish()
        decider, self._decider = self._decider, None
        return decider.finish()


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

    Such a model goes without Dynamic VRAM, which would also keep it in host memory, and would copy
    it to the GPU in its first step.

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
    needed = 1.1 * size + WORK_BYTES + memory.minimum_inference_memory()
    if needed > memory.get_total_memory(device):
        return False
    memory.free_memory(needed, device)
    return memory.get_free_memory(device) > needed
