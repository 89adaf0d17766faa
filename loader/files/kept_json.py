"""Files of caches: the SHA-256 of some JSON in the first line, the JSON after it.

A file that was damaged or edited counts as missing, since its content can be computed again.
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
    """Replace a file; its folder is created.

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
        OSError: the file cannot be read; FileNotFoundError: it does not exist.
        ValueError, RecursionError: it is damaged.
    """
    with open_regular(path) as file:
        found = file.read(min(_MAX_BYTES, os.fstat(file.fileno()).st_size))
    digest, _, text = found.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("its checksum differs")
    return json.loads(text)
