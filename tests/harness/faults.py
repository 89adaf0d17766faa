"""Faults of the system, made by the kernel itself: a process that is forked gets them as errors.

Linux on x86-64 only: a seccomp filter answers chosen system calls with an error.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import struct
import traceback
from collections.abc import Callable

READS = (0, 17, 19)  # read, pread64, readv
WRITES = (1, 18, 20, 40, 285)  # write, pwrite64, writev, sendfile, fallocate
SYNCS = (74, 75)  # fsync, fdatasync
NAMES = (82, 264, 316, 86, 265)  # rename, renameat, renameat2, link, linkat
CHANGES = (*NAMES, 83, 258, 87, 263, 280, 76, 77)  # mkdir, unlink, utimensat, truncate
_OPENAT = 257
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _THIRD_ARGUMENT = 0, 32  # offsets in what a filter is given


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def refuse(calls: tuple[int, ...], error: int, *, opening: bool = False) -> None:
    """Let system calls of this thread fail with an error, for good; `opening` files to write too.

    Raises:
        OSError: the kernel has no filters.
    """
    steps = [(_LOAD, 0, 0, _NUMBER)]
    for call in calls:
        steps += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _ERROR | error)]
    if opening:
        steps += [(_EQUAL, 0, 3, _OPENAT), (_LOAD, 0, 0, _THIRD_ARGUMENT)]
        steps += [(_ANY_BIT, 0, 1, _WRITING), (_RETURN, 0, 0, _ERROR | error)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    program = _Program(len(steps), code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter")


def no_more_files() -> None:
    """Let this process open no further file."""
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for _ in range(used - lowest):  # fill what is free below the limit
        os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))


FAULTS: dict[str, Callable[[], None]] = {
    "EIO when it is synced": lambda: refuse(SYNCS, errno.EIO),
    "EIO when it is read": lambda: refuse(READS, errno.EIO),
    "EIO when it is renamed": lambda: refuse(NAMES, errno.EIO),
    "ENOSPC when it is written": lambda: refuse(WRITES, errno.ENOSPC),
    "ENOSPC when it is synced": lambda: refuse(SYNCS, errno.ENOSPC),
    "a folder that is read-only": lambda: refuse(CHANGES, errno.EROFS, opening=True),
    "no more file descriptors": no_more_files,
}
"""What makes each of them."""


def with_fault(
    fault: str, work: Callable[[], object], expected: tuple[type[Exception], ...] = ()
) -> tuple[bool, str]:
    """Do some work in a process of its own that has a fault.

    Returns:
        Whether it was done or raised what was expected; and the error, if any.
    """
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        _child(fault, work, expected, theirs)
    theirs.close()
    told = b""
    while part := ours.recv(1 << 16):
        told += part
    ours.close()
    status = os.waitpid(child, 0)[1]
    return status == 0, told.decode("utf-8", "replace")


def _child(fault: str, work: Callable, expected: tuple, theirs: socket.socket) -> None:
    code = 1
    try:
        FAULTS[fault]()
        try:
            work()
        except expected as error:
            theirs.send(f"{type(error).__name__}: {error}".encode())
        code = 0
    except BaseException:
        theirs.send(traceback.format_exc()[-20_000:].encode())
    finally:
        os._exit(code)
