"""Moving weights between a mapped file, the GPU and the host without waiting for each."""

from __future__ import annotations

from collections import deque

import torch

_CHUNK_BYTES = 16 << 20
_SLOTS = 4


class Transfer:
    """Copies to and from one device through a few pinned buffers.

    A copy from pageable memory stops the CPU until it is done; through pinned buffers the CPU
    reads the next piece of the file while the GPU takes the last one and searches. On devices
    other than CUDA's it copies directly.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the device that weights go to."""
        self.device = device
        self._staged = device.type == "cuda"
        self._slots: deque[_Slot] = deque()

    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU tensor's copy on the device; one that is there already as it is."""
        if not self._staged or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return tensor.to(self.device)
        copied = torch.empty_like(tensor, device=self.device)
        for source, target in zip(_pieces(tensor), _pieces(copied), strict=True):
            slot = self._next_slot()
            buffer = slot.buffer[: source.numel()]
            buffer.copy_(source)
            target.copy_(buffer, non_blocking=True)
            slot.used()
        return copied

    def down(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a device tensor's copy on the CPU, which is complete after `finish`."""
        if not self._staged:
            return tensor.to("cpu")
        copied = torch.empty_like(tensor, device="cpu")
        for source, target in zip(_pieces(tensor), _pieces(copied), strict=True):
            slot = self._next_slot()
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
            slot.used(target)
        return copied

    def finish(self) -> None:
        """Wait for all copies, and give the buffers back."""
        for slot in self._slots:
            slot.free()
        self._slots.clear()

    def _next_slot(self) -> _Slot:
        if len(self._slots) < _SLOTS:
            self._slots.append(_Slot())
        else:
            self._slots.rotate(-1)
        slot = self._slots[-1]
        slot.free()
        return slot


class _Slot:
    """A pinned buffer, the GPU's work on it, and where its content goes then."""

    def __init__(self) -> None:
        self.buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        self._done = torch.cuda.Event()
        self._target: torch.Tensor | None = None

    def used(self, target: torch.Tensor | None = None) -> None:
        """Note that the GPU was told to read or fill the buffer, and for which CPU memory."""
        self._done.record()
        self._target = target

    def free(self) -> None:
        """Wait for the GPU, and copy what came from it to its place."""
        self._done.synchronize()
        if self._target is not None:
            self._target.copy_(self.buffer[: self._target.numel()])
            self._target = None


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a contiguous tensor into views of its bytes that fit a buffer."""
    return tensor.view(-1).view(torch.uint8).split(_CHUNK_BYTES)
