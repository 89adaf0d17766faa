"""A key by which one sees whether a file has changed since it was read."""

from __future__ import annotations

import os
from pathlib import Path


def version_of(path: str | Path) -> tuple[int, int, int, int]:
    """Return a key that changes with the file: mtime (ns), size (bytes), inode and ctime (ns).

    ctime is needed for a file that was overwritten by one of the same size and mtime.

    Raises:
        OSError: there is no such file.
    """
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns
