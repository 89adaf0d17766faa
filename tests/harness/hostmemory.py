"""What a process takes of the host's memory, beyond the files that it maps."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from pathlib import Path

_SECONDS = 0.005
"""Between two looks. Each takes Python's lock for a moment from what is measured."""


def anonymous(process: int | str = "self") -> int:
    """Return a process's anonymous memory in bytes, as Linux tells it."""
    lines = Path(f"/proc/{process}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class _MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


def allocated() -> dict[str, float]:
    """Return what C code holds of the first heap, in MB, and how many blocks Python holds."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _MallInfo
    found = libc.mallinfo2()
    in_use = (found.uordblks + found.hblkhd) / 1e6
    return {
        "in use MB": in_use,
        "free MB": found.fordblks / 1e6,
        "blocks": sys.getallocatedblocks(),
    }


def trimmed() -> int:
    """Give back to the system what is free, and return the anonymous memory in bytes then."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return anonymous()


class PeakMemory:
    """Largest growth of this process's anonymous memory in a block.

    Attributes:
        bytes: known once the block has ended.
    """

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        self._file = os.open("/proc/self/statm", os.O_RDONLY)
        self._start = self._now()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        os.close(self._file)

    def _watch(self) -> None:
        while self._running:
            self.bytes = max(self.bytes, self._now() - self._start)
            time.sleep(_SECONDS)

    def _now(self) -> int:
        """Return all resident memory but that of files and of what is shared."""
        _, resident, shared, *_ = os.pread(self._file, 99, 0).split()
        return (int(resident) - int(shared)) * mmap.PAGESIZE
