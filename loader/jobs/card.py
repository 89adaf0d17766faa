"""What a device's memory has room for, so that ComfyUI need not stream a model's weights."""

from __future__ import annotations

from typing import NamedTuple

import comfy.model_management as memory

OTHERS_BYTES = 1 << 29
"""What the driver and the screen take of a card. ComfyUI's own reserve is beside that."""

_SLACK = 1.05  # between tensors in torch's memory; ComfyUI counts with it too


class Card(NamedTuple):
    """The memory of the device that computes.

    All of it is counted and not what is free: that changes from minute to minute, and so would the
    layers that are kept and the pictures.

    Attributes:
        total: bytes of its memory.
        beside: bytes that ComfyUI wants to have beside the weights in a step.
    """

    total: int
    beside: int

    @classmethod
    def of(cls, needed: float) -> Card:
        """Return the device's memory, for a model that needs so many bytes beside its weights."""
        beside = max(memory.minimum_inference_memory(), needed + memory.extra_reserved_memory())
        return cls(int(memory.get_total_memory(memory.get_torch_device())), int(beside))

    @property
    def weights(self) -> int:
        """The bytes that a model's weights may have."""
        return max(0, int((self.total - OTHERS_BYTES - self.beside) / _SLACK))

    def sentence(self, least: int) -> str:
        """Return a sentence for users.

        Args:
            least: bytes of the model with every layer quantized.
        """
        has = f"this card's {self.total / 2**30:.1f} GiB have room for {self.weights / 2**30:.2f}"
        if least <= self.weights:
            return has
        return f"{has}, the model needs {least / 2**30:.2f}: some layers are streamed"
