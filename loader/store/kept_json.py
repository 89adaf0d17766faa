"""A file of what can be found out again: JSON behind the SHA-256 of its bytes.

What is damaged or edited counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ...calibration import atomic_file
from ...calibration.regular import open_regular

_MAX_BYTES = 16 << 20


def write(path: Path, content: object) -> None:
    """Replace a file; its folder is made.

    Raises:
        OSError: it cannot be written.
        ValueError: a number is not finite.
    """
    text = json.dumps(content, allow_nan=False).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def read(path: Path) -> dict:
    """Return what `write` was given.

    Raises:
        OSError: the file cannot be read; FileNotFoundError: there is none.
        ValueError, RecursionError: it is not as `write` made it.
    """
    with open_regular(path) as file:
        found = file.read(min(_MAX_BYTES, os.fstat(file.fileno()).st_size))
    digest, _, text = found.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("its checksum differs")
    return json.loads(text)
