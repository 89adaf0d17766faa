"""Reading and writing a statistics file that other processes may also write."""

from __future__ import annotations

import glob
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from ...calibration import Statistics, StatisticsError, load_statistics, save_statistics
from ..files.versions import version_of

DAMAGED = ".damaged"
"""Suffix of a damaged file that was set aside."""

SHORTLY = 0.2
"""Seconds that a sampling may wait for a lock. Saving takes about 0.1 s."""

_LOCK_SECONDS = 10
_CACHED_FILES = 6
# Seconds between attempts to write: Windows cannot replace a file while another process reads it.
_PATIENCE = (0.05, 0.2, 0.5) if os.name == "nt" else ()


class FileLockedError(OSError):
    """Another process holds a file's lock."""


@contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[None]:
    """Hold a file's lock, so that no other process writes it; remove leftovers of killed ones.

    Args:
        path: of the file.
        patience: seconds to wait for the lock; None waits for ten.

    Raises:
        FileLockedError: another process holds the lock.
        OSError: the folder cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = _LOCK_SECONDS if patience is None else patience
    lock = filelock.FileLock(f"{path}.lock", timeout=seconds)
    try:
        lock.acquire()
    except filelock.Timeout:
        reason = f"another process keeps {path.name} locked: try again later"
        raise FileLockedError(reason) from None
    try:
        sweep(path)
        yield
    finally:
        lock.release()


def write(statistics: Statistics, path: Path) -> None:
    """Replace a file. The caller holds its lock.

    Raises:
        OSError: it cannot be written; it is unchanged.
    """
    try:
        _save(statistics, path)
    except OSError as error:  # the system's message about a full disk does not name the file
        raise OSError(f"{path.name} cannot be written: {error.strerror}") from error
    _keep(path, version_of(path), statistics)


def _save(statistics: Statistics, path: Path) -> None:
    for seconds in _PATIENCE:
        try:
            return save_statistics(statistics, path)
        except PermissionError:
            time.sleep(seconds)
    return save_statistics(statistics, path)


def remove(path: Path, beside: Path) -> bool:
    """Remove a file under its lock, with its damaged version and the sketches `beside` it.

    Returns:
        Whether the file existed.

    Raises:
        OSError: it cannot be removed, or another process holds the lock.
    """
    with locked(path):
        there = path.exists()
        try:
            path.unlink(missing_ok=True)
            path.with_name(path.name + DAMAGED).unlink(missing_ok=True)
            beside.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(f"{path.name} cannot be removed: {error.strerror}") from error
    return there


def unreadable(path: Path, error: Exception) -> str:
    """Return one sentence about a file that cannot be read. It always names the file."""
    if not isinstance(error, OSError):
        return str(error)
    return f"{path.name} cannot be read: {error.strerror or error}"


def read_or_set_aside(path: Path) -> Statistics | None:
    """Read a file whose lock is held; None if there is none. A damaged file is renamed.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(unreadable(path, error)) from error
    except StatisticsError as error:
        aside = path.with_name(path.name + DAMAGED)
        os.replace(path, aside)
        logging.warning("HSWQ: %s; it is kept as %s and a new one is begun", error, aside.name)
        return None


def sweep(path: Path) -> None:
    """Remove what a process that was killed has left beside a file; its lock is held."""
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        stray.unlink(missing_ok=True)


_cache: dict[Path, tuple[tuple, Statistics]] = {}
_cache_lock = threading.Lock()


def read(path: Path) -> Statistics:
    """Return a statistics file's content, from memory if the file has not changed.

    Raises:
        OSError, StatisticsError: as `load_statistics`.
    """
    statistics = known(path)
    if statistics is not None:
        return statistics
    version = version_of(path)
    statistics = load_statistics(path)
    if version == version_of(path):
        _keep(path, version, statistics)
    return statistics


def known(path: Path) -> Statistics | None:
    """Return a file's content from memory; None if it is not there or the file has changed.

    Raises:
        OSError: there is no such file.
    """
    version, statistics = _cache.get(path, (None, None))
    return statistics if version == version_of(path) else None


def _keep(path: Path, version: tuple, statistics: Statistics) -> None:
    with _cache_lock:  # routes and prompts run in different threads
        _cache.pop(path, None)
        _cache[path] = version, statistics
        while len(_cache) > _CACHED_FILES:
            del _cache[next(iter(_cache))]
