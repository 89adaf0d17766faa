"""Moving weights between the host and the GPU, quickly and without waiting for each."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import BinaryIO, NamedTuple

import comfy.model_management as memory
import torch

_PIECE_BYTES = 16 << 20
_RING_BYTES = 64 << 20
_READERS = 4  # threads
_READ_BYTES = 512 << 10  # the fewest that are worth a thread


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device, as `Tensor.to` does, but quicker."""
    if is_up_from_pageable(tensor, device):
        return transfer_of(device).up(tensor)
    way = tensor.device.type, device.type
    if way == ("cuda", "cpu") and type(tensor) is torch.Tensor:
        return transfer_of(tensor.device).place(tensor, device)
    return tensor.to(device)


def is_up_from_pageable(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a copy to a device is from host memory that the GPU cannot read itself.

    It never is where a compiler traces with tensors that have no memory. With ComfyUI's option
    --disable-pinned-memory it counts as if the GPU could, so that ComfyUI's own way is taken.
    """
    if not _is_staged(device) or tensor.device.type != "cpu" or type(tensor) is not torch.Tensor:
        return False
    return not tensor.is_pinned()


def _is_staged(device: torch.device) -> bool:
    return device.type == "cuda" and memory.MAX_PINNED_MEMORY > 0


@functools.cache
def transfer_of(device: torch.device) -> Transfer:
    """Return a device's Transfer. All share its pinned memory, until the next load has ended."""
    return Transfer(device)


class Transfer:
    """Copies to and from one device through pinned memory.

    A copy from pageable memory blocks the CPU until it is done. Through pinned memory, the CPU
    reads the next piece of the file while the GPU receives the last one and searches. On devices
    other than CUDA's, and with ComfyUI's --disable-pinned-memory, it copies directly.

    On an H200 it copies 43 GiB/s from a mapped file to the GPU and 11 to the host. `Tensor.to` has
    5.8 and 1.2 there.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the device that weights go to. Pinned memory is allocated when first needed."""
        self.device = device
        self._staged = _is_staged(device)
        self._ring = _Ring(_RING_BYTES, device)
        self._lock = threading.Lock()

    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU tensor's copy on the device; a tensor of the device is returned as it is.

        The copy is complete for the current stream of the device.
        """
        if not self._staged or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return tensor.to(self.device)
        copied = torch.empty_like(tensor, device=self.device)
        self.fill(copied, tensor)
        return copied

    def fill(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a CPU tensor into one of the device, complete for the device's current stream.

        Both have the same dtype and shape.
        """
        if not (self._staged and source.is_contiguous() and target.is_contiguous()):
            target.copy_(source)
            return
        pieces = iter(_pieces(source))
        self._send(target, lambda buffer: buffer.copy_(next(pieces)))

    def read(self, file: BinaryIO, count: int) -> torch.Tensor:
        """Return the next bytes of a file on the device, complete for its current stream.

        Raises:
            OSError: there are fewer, or they cannot be read.
        """
        if not self._staged:
            found = torch.empty(count, dtype=torch.uint8)
            _read_into(found, file)
            return found.to(self.device)
        found = torch.empty(count, dtype=torch.uint8, device=self.device)
        self._send(found, lambda buffer: _read_into(buffer, file))
        return found

    def place(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a completed copy on another device; a tensor of that device as it is."""
        if tensor.numel() == 1:  # staging a single number gains nothing
            return tensor.to(device)
        with self._lock:
            copied = self._begin_to_place(tensor, device)
            self._ring.settle()
        return copied

    def place_soon(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a copy as `place` does, which need not be complete before `finish` is called.

        The CPU goes on while the GPU fills pinned memory, and empties that when it is needed again.
        """
        with self._lock:
            return self._begin_to_place(tensor, device)

    def _begin_to_place(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not (self._staged and device.type == "cpu" and tensor.is_contiguous()):
            return tensor.to(device)
        copied = torch.empty_like(tensor, device=device)
        for source, target in zip(_pieces(tensor), _pieces(copied), strict=True):
            buffer = self._ring.take(source.numel())
            buffer.copy_(source, non_blocking=True)
            self._ring.hand_over(buffer, functools.partial(target.copy_, buffer))
        return copied

    def _send(self, target: torch.Tensor, write: Callable[[torch.Tensor], object]) -> None:
        """Fill a tensor of the device with what a function writes, piece by piece."""
        with self._lock:
            for room in _pieces(target):
                buffer = self._ring.take(room.numel())
                write(buffer)
                room.copy_(buffer, non_blocking=True)
                self._ring.hand_over(buffer)

    def finish(self) -> None:
        """Complete all copies, and release the pinned memory."""
        with self._lock:
            self._ring.empty()


class _Busy(NamedTuple):
    """A part of the ring that the GPU is still reading or filling.

    Attributes:
        start: its first byte.
        end: the byte after its last one.
        done: when the GPU has ended; None where the device is the CPU, in tests.
        then: what is to be done with the part, before it is free again.
    """

    start: int
    end: int
    done: torch.cuda.Event | None
    then: Callable[[], object] | None


class _Ring:
    """Pinned memory, handed out part by part. A part is free again when it was copied."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device = size, device
        self._memory: torch.Tensor | None = None
        self._busy: deque[_Busy] = deque()
        self._start = self._end = 0  # of the part that was taken last

    def take(self, count: int) -> torch.Tensor:
        """Return `count` bytes; wait for the GPU if they are still in use."""
        if self._memory is None:
            with torch.inference_mode(False):  # it is used in both modes
                self._memory = _pinned(self._size)
        start = self._end if self._end + count <= self._size else 0
        self._start, self._end = start, start + count
        while self._busy and any(b.start < self._end and start < b.end for b in self._busy):
            self._free_oldest()
        return self._memory[start : self._end]

    def hand_over(self, buffer: torch.Tensor, then: Callable[[], object] | None = None) -> None:
        """Note that the GPU was told to read or fill the part that was taken last."""
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._device))
        self._busy.append(_Busy(self._start, self._start + buffer.numel(), done, then))

    def settle(self) -> None:
        """Wait for all copies, and do what is to be done then."""
        while self._busy:
            self._free_oldest()

    def empty(self) -> None:
        """Settle, and release the memory."""
        self.settle()
        self._memory = None
        self._start = self._end = 0

    def _free_oldest(self) -> None:
        busy = self._busy.popleft()
        if busy.done is not None:
            busy.done.synchronize()
        if busy.then is not None:
            busy.then()


def _read_into(buffer: torch.Tensor, file: BinaryIO) -> None:
    """Fill a buffer with the next bytes of a file, large ones by several threads.

    One thread copies 5 GiB/s out of the page cache, and waits for a disk that could do more.

    Raises:
        OSError: there are fewer, or they cannot be read.
    """
    count = buffer.numel()
    if count < _READERS * _READ_BYTES or not hasattr(os, "preadv"):  # Windows lacks it
        _fill(buffer, 0, lambda left, _: file.readinto(left))
        return
    start, size, parts = file.tell(), -(-count // _READERS), []
    read = functools.partial(os.preadv, file.fileno())
    try:
        for at, part in zip(range(start, start + count, size), buffer.split(size), strict=True):
            parts.append(_readers().submit(_fill, part, at, lambda left, at: read([left], at)))
    finally:
        wait(parts)  # nobody writes into the buffer any more, even if one has failed
    for part in parts:
        part.result()
    file.seek(start + count)


def _fill(buffer: torch.Tensor, at: int, read: Callable[[memoryview, int], int]) -> None:
    """Fill a buffer with what follows a place in a file.

    `read` takes the room that is left and the place. It returns how many bytes it has read, which
    may be fewer, as some file systems do.
    """
    left = memoryview(buffer.numpy())
    while left:
        count = read(left, at)
        if not count:
            raise OSError("it has become shorter")
        left, at = left[count:], at + count


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, "hswq-read")


def _pinned(size: int) -> torch.Tensor:
    """Return bytes of pinned memory; of ordinary memory, which is slower, if there is none."""
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.empty(size, dtype=torch.uint8)


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a contiguous tensor into views of its bytes that each fit into the ring."""
    return tensor.view(-1).view(torch.uint8).split(_PIECE_BYTES)
