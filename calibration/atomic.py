"""Replacing a file in one step, and removing temporary files of processes that were killed."""

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
except ImportError:  # on Windows, which needs no locks here: it does not remove open files
    fcntl = None

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_FRESH_SECONDS = 60  # its process has locked it within this time


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary binary file beside `path` that takes its place when the block succeeds.

    On any error the temporary file is removed and `path` is unchanged. If the process is killed,
    the temporary file remains until `sweep` removes it.

    Raises:
        FileExistsError: `path` exists at the end of the block, and `replace` is False.
    """
    path = Path(path)
    # The module tempfile is not used because only the owner may read its files.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while it is locked, so that `sweep` cannot remove it
                _place(temporary, path, replace)
        if fcntl is None:  # Windows cannot rename an open file
            _place(temporary, path, replace)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _place(temporary: Path, path: Path, replace: bool) -> None:
    if not replace:  # a link, because it fails if the file exists, while os.replace does not
        try:
            os.link(temporary, path)  # if two processes do this at once, one of them fails
        except FileExistsError:
            raise
        except OSError as error:  # the file system has no links
            if path.exists():
                raise FileExistsError(errno.EEXIST, "it is there already", path) from error
        else:
            return os.unlink(temporary)
    return os.replace(temporary, path)


def sweep(folder: Path) -> int:
    """Remove the temporary files in a folder whose processes have ended; return how many.

    A process holds a lock on its temporary file as long as it runs. Files that cannot be removed
    remain.
    """
    removed, found = 0, []
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        found = list(folder.glob(".*.tmp"))
    for path in found:
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                removed += _remove(path)
    return removed


def _remove(path: Path) -> bool:
    """Remove a temporary file unless a process has it open, or has only just created it."""
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
    """Lock a file; return False if another process has locked it. Windows locks open files."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is locked, or the file system has no locks
        return False
    return True
