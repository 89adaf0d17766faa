"""Opening a file in a folder where others may have put anything."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NEVER_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a named pipe would wait for a writer


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read its bytes. A folder, pipe or device is refused at once.

    Raises:
        OSError: it is not a regular file, or cannot be opened; FileNotFoundError: it does not
            exist.
    """
    descriptor = os.open(path, _FLAGS | _NEVER_WAIT)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "it is not a regular file", os.fspath(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
