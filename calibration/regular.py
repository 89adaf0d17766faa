"""Opening a file of a folder that anybody may put something into."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NEVER_WAIT = getattr(os, "O_NONBLOCK", 0)  # for somebody to write into a named pipe


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read its bytes; a folder, a pipe and a device are refused without a wait.

    Raises:
        OSError: it is no regular file, or cannot be opened; FileNotFoundError: there is none.
    """
    descriptor = os.open(path, _FLAGS | _NEVER_WAIT)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "it is no regular file", os.fspath(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
