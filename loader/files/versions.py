"""Telling whether a file is still the one that was read."""

from __future__ import annotations

import os
from pathlib import Path


def version_of(path: str | Path) -> tuple[int, int, int, int]:
    """Return a key that changes with the file: mtime (ns), size (bytes), inode and ctime (ns).

    A copy that keeps its time, over another of its size, has another ctime.

    Raises:
        OSError: there is no such file.
    """
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns
