"""A hash over all bytes of a model's weights, computed in the background: a file has gigabytes."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from . import owners
from .errors import ModelFileError
from .model_file import ModelFile
from .safetensors import TensorEntry, is_safetensors
from .versions import version_of

AT_ONCE_BYTES = 64 << 20
"""A file that takes a tenth of a second need not be waited for."""

_CHUNK = 8 << 20
_SHARE_WHILE_BUSY = 0.1  # of one core's time, and of what the disk can read
_TICK_SECONDS = 2  # of FAT's clock, the coarsest: a later change may leave the time as it is
_SECONDS_AT_EXIT = 1.0


class StoppedError(Exception):
    """ComfyUI ends before a file was read."""


def read_whole(file: ModelFile, rest: Callable[[float], None] = lambda _: None) -> str:
    """Return a SHA-256 (hex) over names, shapes, dtypes and all bytes of the diffusion model.

    As `ModelFile.read_fingerprint`, but for the sample. The file is read in its own order.

    Args:
        file: a safetensors file.
        rest: is called with the seconds that each part took, and may wait or raise.

    Raises:
        OSError: the file cannot be read.
        ModelFileError: it is damaged.
    """
    parts, buffer = {}, memoryview(bytearray(_CHUNK))
    with open(file.path, "rb", buffering=0) as stream:
        for name, entry in sorted(file.own.items(), key=lambda one: one[1].start):
            parts[name] = _hash_of(stream, entry, buffer, rest)
    digest = hashlib.sha256()
    for name in sorted(parts):
        entry = file.own[name]
        digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode() + parts[name])
    return digest.hexdigest()


def _hash_of(
    stream: BinaryIO, entry: TensorEntry, buffer: memoryview, rest: Callable[[float], None]
) -> bytes:
    digest, left = hashlib.sha256(), entry.end - entry.start
    stream.seek(entry.start)
    while left:
        began = time.perf_counter()
        count = stream.readinto(buffer[: min(left, len(buffer))])
        if not count:
            raise OSError("it has become shorter")
        digest.update(buffer[:count])
        left -= count
        rest(time.perf_counter() - began)
    return digest.digest()


class Background:
    """Hashes files one after the other, in a thread that ends when there is nothing to do.

    Attributes:
        busy: whether ComfyUI has other work, which goes first.
    """

    def __init__(self) -> None:
        """Start no thread."""
        self.busy: Callable[[], bool] = lambda: False
        self._paths: dict[str, None] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, path: str) -> None:
        """Hash a file soon."""
        with self._lock:
            if self._stop.is_set() or path in self._paths:
                return
            self._paths[path] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hswq hash", daemon=True)
                self._thread.start()

    def join(self, seconds: float | None = None) -> None:
        """Wait until nothing is left to do."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def stop(self) -> None:
        """Give up what is not done; it begins anew when the file is used again."""
        self._stop.set()
        self.join(_SECONDS_AT_EXIT)

    def _run(self) -> None:
        while True:
            with self._lock:
                path = next(iter(self._paths), None)
                if path is None or self._stop.is_set():
                    self._thread = None
                    return
            try:
                if not is_settled(version_of(path)) and self._stop.wait(_TICK_SECONDS):
                    raise StoppedError
                complete(path, self._rest)
            except StoppedError:
                pass
            except (OSError, ModelFileError) as error:
                logging.debug("HSWQ: %s is not hashed: %s", path, error)
            except Exception as error:  # whatever it was, the next file is another
                logging.warning("HSWQ: %s is not hashed: %s", os.path.basename(path), error)
            with self._lock:
                self._paths.pop(path, None)

    def _rest(self, seconds: float) -> None:
        """Wait after some work, while others need the disk and the cores."""
        wait = seconds * (1 / _SHARE_WHILE_BUSY - 1) if self.busy() else 0
        if self._stop.wait(wait) if wait else self._stop.is_set():
            raise StoppedError


background = Background()
atexit.register(background.stop)


def complete(path: str, rest: Callable[[float], None] = lambda _: None) -> None:
    """Hash a file and keep the result, unless that is known, or it changes meanwhile.

    Raises:
        OSError, ModelFileError: as of `read_whole`.
    """
    version = version_of(path)
    if owners.whole_of(path, version) is not None:
        return
    file = ModelFile(path)
    whole = read_whole(file, rest)
    if file.version == version_of(path):
        owners.note(path, file.version, whole)


def is_settled(version: owners.Version) -> bool:
    """Whether a file's next change will change its version too."""
    return abs(time.time() - version[0] / 1e9) >= _TICK_SECONDS


def used(fingerprint: str, path: str) -> str:
    """Note that a file is used; return the fingerprint that is its own, as far as is known.

    Raises:
        OSError: the file is gone.
        ModelFileError: it is damaged.
    """
    version = version_of(path)
    owners.claim(fingerprint, path, version)
    owner = owners.owner_of(fingerprint)
    decided = owners.is_decided(fingerprint, path, version)
    if owner is not None and owner.whole is None and not decided:  # it is still there
        with contextlib.suppress(OSError, ModelFileError):  # it has gone just now
            _complete(owner.path, at_once=True)
    _complete(path, at_once=not decided)
    return owners.resolved(fingerprint, path, version)


def _complete(path: str, at_once: bool) -> None:
    """Hash a file soon, or at once where that takes no time; a .ckpt would be read into memory."""
    version = version_of(path)
    if owners.whole_of(path, version) is not None or not is_safetensors(path):
        return
    if at_once and is_settled(version) and version[1] <= AT_ONCE_BYTES:
        complete(path)
    else:
        background.add(path)
