"""A key by which one sees whether a file has changed since it was read."""

from __future__ import annotations

import os
import time
from pathlib import Path

TICK_SECONDS = 2
"""Resolution of FAT's file times, the coarsest there is."""


def version_of(path: str | Path) -> tuple[int, int, int, int]:
    """Return a key that changes with the file: mtime (ns), size (bytes), inode and ctime (ns).

    ctime is needed for a file that was overwritten by one of the same size and mtime.

    Raises:
        OSError: there is no such file.
    """
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns


def is_settled(version: tuple[int, int, int, int]) -> bool:
    """Whether a file's next change will change its version too.

    If the file was changed within the last TICK_SECONDS, a change now may leave its time the same.
    """
    return abs(time.time() - version[0] / 1e9) > TICK_SECONDS
