"""A hash over all bytes of a model's weights, computed in the background: it takes seconds."""

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
from .versions import TICK_SECONDS, is_settled, version_of

AT_ONCE_BYTES = 64 << 20
"""Files up to this size are hashed at once, since that takes only a tenth of a second."""

_CHUNK = 8 << 20
_SHARE_WHILE_BUSY = 0.1  # share of a core's and of the disk's time to use while ComfyUI works
_SECONDS_AT_EXIT = 1.0


class StoppedError(Exception):
    """ComfyUI ends before a file was read to its end."""


def read_whole(file: ModelFile, rest: Callable[[float], None] = lambda _: None) -> str:
    """Return a SHA-256 (hex) over names, shapes, dtypes and all bytes of the diffusion model.

    It is like `ModelFile.read_fingerprint`, but with all bytes in place of samples. The file is
    read from its beginning to its end.

    Args:
        file: a safetensors file.
        rest: is called after each part, with the seconds that it took. It may wait or raise.

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
        busy: tells whether ComfyUI has other work. Then hashing takes only a share of the time.
    """

    def __init__(self) -> None:
        """Start without a thread; the first file starts it."""
        self.busy: Callable[[], bool] = lambda: False
        self._paths: dict[str, None] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, path: str) -> None:
        """Hash a file when its turn comes."""
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
        """Stop hashing. Files that are not done are hashed when they are used again."""
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
                if not is_settled(version_of(path)) and self._stop.wait(TICK_SECONDS):
                    raise StoppedError
                complete(path, self._rest)
            except StoppedError:
                pass
            except (OSError, ModelFileError) as error:
                logging.debug("HSWQ: %s is not hashed: %s", path, error)
            except Exception as error:  # an unknown error must not stop the hashing of other files
                logging.warning("HSWQ: %s is not hashed: %s", os.path.basename(path), error)
            with self._lock:
                self._paths.pop(path, None)

    def _rest(self, seconds: float) -> None:
        """Wait after some work if ComfyUI is busy, so that it has the disk and the cores."""
        wait = seconds * (1 / _SHARE_WHILE_BUSY - 1) if self.busy() else 0
        if self._stop.wait(wait) if wait else self._stop.is_set():
            raise StoppedError


background = Background()
atexit.register(background.stop)


def complete(path: str, rest: Callable[[float], None] = lambda _: None) -> None:
    """Hash a file and keep the result, unless it is known already or the file changes meanwhile.

    Raises:
        OSError, ModelFileError: as for `read_whole`.
    """
    version = version_of(path)
    if owners.whole_of(path, version) is not None:
        return
    file = ModelFile(path)
    whole = read_whole(file, rest)
    if file.version == version_of(path):
        owners.note(path, file.version, whole)


def used(fingerprint: str, path: str) -> str:
    """Note that a file is used; return its own fingerprint, as far as it is known.

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
    """Hash a file in the background, or at once if it is small.

    A .ckpt is not hashed, because it would be read into memory as a whole.
    """
    version = version_of(path)
    if owners.whole_of(path, version) is not None or not is_safetensors(path):
        return
    if at_once and is_settled(version) and version[1] <= AT_ONCE_BYTES:
        complete(path)
    else:
        background.add(path)
