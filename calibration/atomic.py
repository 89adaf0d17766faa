"""Replacing a file at once, and removing what a process that was killed has left of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows removes no file that is open
    fcntl = None

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_FRESH_SECONDS = 60  # in which its process has surely locked it


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary binary file beside `path` that takes its place when the block succeeds.

    On any error the temporary file is removed and `path` is left as it was. What a killed process
    leaves of it, `sweep` removes.

    Raises:
        FileExistsError: without `replace`, there is a file by now.
    """
    path = Path(path)
    # Not of tempfile, whose files only their owner may read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # still locked
                _place(temporary, path, replace)
        if fcntl is None:  # Windows renames no file that is open
            _place(temporary, path, replace)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _place(temporary: Path, path: Path, replace: bool) -> None:
    if not replace:
        try:
            os.link(temporary, path)  # of two processes at once, one fails
        except FileExistsError:
            raise
        except OSError as error:  # a file system without links
            if path.exists():
                raise FileExistsError(errno.EEXIST, "it is there already", path) from error
        else:
            return os.unlink(temporary)
    return os.replace(temporary, path)


def sweep(folder: Path) -> int:
    """Remove the temporary files in a folder whose processes are gone; return how many.

    A process has its own locked as long as it lives. What cannot be removed is left.
    """
    removed = 0
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                removed += _remove(path)
    return removed


def _remove(path: Path) -> bool:
    """Remove a temporary file unless a process has it open or has only just made it."""
    status = path.lstat()
    fresh = abs(time.time() - status.st_mtime) < _FRESH_SECONDS
    if fresh or not stat.S_ISREG(status.st_mode):
        return False
    with contextlib.ExitStack() as held:
        if fcntl is not None and not _lock(held.enter_context(open(path, "rb"))):
            return False
        os.unlink(path)
    return True


def _lock(file: BinaryIO) -> bool:
    """Whether nobody else has locked a file; Windows locks what is open by itself."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or on a file system that has no locks
        return False
    return True
