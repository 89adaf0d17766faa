"""Which file names are safe on every operating system."""

from __future__ import annotations

import re

_PART = re.compile(r"\w[\w .()+,@-]*")
_MAX_PART_BYTES = 200
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\s*\..*)?\s*", re.IGNORECASE)
"""Names of devices on Windows, also with an extension."""


def is_safe(part: str) -> bool:
    return (
        _PART.fullmatch(part) is not None
        and part[-1] not in " ."
        and len(part.encode()) <= _MAX_PART_BYTES
        and not is_reserved(part)
    )


def is_reserved(name: str) -> bool:
    """Whether Windows takes a file's name for that of a device, in any folder."""
    return _RESERVED.fullmatch(name) is not None
