"""Telling whether a file is still the one that was read."""

from __future__ import annotations

import os
from pathlib import Path


def version_of(path: Path) -> tuple:
    """Return a key that changes with the file: mtime (ns), size (bytes) and inode."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino
