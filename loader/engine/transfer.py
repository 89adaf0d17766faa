"""Moving weights between a mapped file, the GPU and the host without waiting for each."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch

_PIECE_BYTES = 16 << 20
_UP_BYTES = 64 << 20
_DOWN_BYTES = 128 << 20  # some twenty layers, so that the GPU searches while the CPU goes on


class Transfer:
    """Copies to and from one device through pinned memory.

    A copy from pageable memory stops the CPU until it is done; through pinned memory the CPU
    reads the next piece of the file while the GPU takes the last one and searches. On devices
    other than CUDA's it copies directly.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the device that weights go to; pinned memory is taken when first needed."""
        self.device = device
        self._staged = device.type == "cuda"
        self._up, self._down = _Ring(_UP_BYTES), _Ring(_DOWN_BYTES)
        self._numbers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU tensor's copy on the device; one that is there already as it is."""
        if not self._staged or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return tensor.to(self.device)
        copied = torch.empty_like(tensor, device=self.device)
        for source, target in zip(_pieces(tensor), _pieces(copied), strict=True):
            buffer = self._up.take(source.numel())
            buffer.copy_(source)
            target.copy_(buffer, non_blocking=True)
            self._up.hand_over(buffer)
        return copied

    def down(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a device tensor's copy on the CPU, which is complete after `finish`."""
        if not self._staged:
            return tensor.to("cpu")
        copied = torch.empty_like(tensor, device="cpu")
        if tensor.numel() == 1:  # a transfer of its own would wait for the device
            self._numbers.append((tensor, copied))
            return copied
        for source, target in zip(_pieces(tensor), _pieces(copied), strict=True):
            buffer = self._down.take(source.numel())
            buffer.copy_(source, non_blocking=True)
            self._down.hand_over(buffer, target)
        return copied

    def finish(self) -> None:
        """Wait for all copies, and give the pinned memory back."""
        self._up.empty()
        self._down.empty()
        if self._numbers:
            found = torch.stack([number for number, _ in self._numbers]).cpu()
            for value, (_, copied) in zip(found, self._numbers, strict=True):
                copied.copy_(value)
            self._numbers.clear()


class _Busy(NamedTuple):
    """A part of the ring that the GPU reads or fills, and where its content goes then."""

    start: int
    end: int
    done: torch.cuda.Event
    target: torch.Tensor | None


class _Ring:
    """Pinned memory that is handed out in turn; a part is free again when the GPU is done."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory: torch.Tensor | None = None
        self._busy: deque[_Busy] = deque()
        self._start = self._end = 0  # of the part that was taken last

    def take(self, count: int) -> torch.Tensor:
        """Return `count` bytes; wait for the GPU where they are still in use."""
        if self._memory is None:
            self._memory = torch.empty(self._size, dtype=torch.uint8, pin_memory=True)
        start = self._end if self._end + count <= self._size else 0
        self._start, self._end = start, start + count
        while self._busy and any(b.start < self._end and start < b.end for b in self._busy):
            self._free_oldest()
        return self._memory[start : self._end]

    def hand_over(self, buffer: torch.Tensor, target: torch.Tensor | None = None) -> None:
        """Note that the GPU was told to read the taken part, or to fill it for `target`."""
        done = torch.cuda.Event()
        done.record()
        self._busy.append(_Busy(self._start, self._start + buffer.numel(), done, target))

    def empty(self) -> None:
        """Wait for everything, and give the memory back."""
        while self._busy:
            self._free_oldest()
        self._memory = None
        self._start = self._end = 0

    def _free_oldest(self) -> None:
        part = self._busy.popleft()
        part.done.synchronize()
        if part.target is not None:
            part.target.copy_(self._memory[part.start : part.end])


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a contiguous tensor into views of its bytes that fit the ring."""
    return tensor.view(-1).view(torch.uint8).split(_PIECE_BYTES)
