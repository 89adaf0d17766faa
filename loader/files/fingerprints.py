"""The fingerprints of model files, kept on disk: reading one anew takes some 2,600 seeks."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ...calibration import atomic_file
from ..host.folders import FOLDER, statistics_folder
from .errors import ModelFileError
from .model_file import ModelFile, opened

DAMAGED = "damaged"
"""What is known of a file that has no fingerprint."""

_FORMAT = 1  # of the kept file, and of the fingerprints in it
_MAX_BYTES = 16 << 20
_TICK_SECONDS = 2  # of FAT's clock, the coarsest: a later change may leave the time as it is
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class _Known(NamedTuple):
    """A fingerprint, and the file's size and time (ns) that it is of."""

    size: int
    modified: int
    fingerprint: str


def fingerprint(file: ModelFile | str) -> str:
    """Return what identifies the diffusion model's weights in a file, whatever its name.

    As `ModelFile.read_fingerprint`, but each version of a file is read once.

    Raises:
        OSError: the file is gone.
        ModelFileError: the file is damaged, or holds no tensors.
    """
    file = opened(file)
    found = known(file.path)
    return _read(file) if found in (None, DAMAGED) else found


def known(path: str) -> str | None:
    """Return a file's fingerprint or DAMAGED, None where it would have to be read.

    Raises:
        OSError: the file is gone.
    """
    version = _version(path)
    with _lock:
        found = _all(_file()).get(os.path.realpath(path))
    return found.fingerprint if found is not None and found[:2] == version else None


def _read(file: ModelFile) -> str:
    path = file.path
    began, version = time.time(), _version(path)
    settled = abs(began - version[1] / 1e9) > _TICK_SECONDS
    try:
        found = file.read_fingerprint()
    except ModelFileError:
        if settled:
            _remember(path, _Known(*version, DAMAGED))
        raise
    if settled:
        _remember(path, _Known(*version, found))
    return found


def _version(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


_lock = threading.Lock()  # of what `_all` returns; prompts and routes ask


@functools.cache
def _all(file: Path | None) -> dict[str, _Known]:
    """Return all that is known, by real path; what is on disk is read once."""
    return {} if file is None else _kept(file)


def _file() -> Path | None:
    """Return where it is kept, None in a script that has no such folder."""
    registered = FOLDER in folder_paths.folder_names_and_paths
    return statistics_folder() / "plans" / "fingerprints.cache" if registered else None


def _remember(path: str, found: _Known) -> None:
    with _lock:
        file = _file()
        _all(file)[os.path.realpath(path)] = found
        # What this version of HSWQ or ComfyUI cannot read, the next one may.
        if file is not None and found.fingerprint != DAMAGED:
            _keep(file)


def _keep(file: Path) -> None:
    """Write what is known of files that are still there; where that fails they are read again.

    Likewise what two processes that write at once lose of each other's.
    """
    files = {
        path: found
        for path, found in {**_kept(file), **_all(file)}.items()
        if found.fingerprint != DAMAGED and os.path.exists(path)
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as stream:
            stream.write(json.dumps({"format": _FORMAT, "files": files}).encode())
    except OSError as error:
        logging.debug("HSWQ: fingerprints are not kept: %s", error)


def _kept(file: Path) -> dict[str, _Known]:
    """Read what is kept; nothing, where the file is not as `_keep` writes it."""
    try:
        with open(file, "rb") as stream:
            content = json.loads(stream.read(_MAX_BYTES))
        files = {path: _Known(*facts) for path, facts in content["files"].items()}
        good = content["format"] == _FORMAT and all(map(_is_good, files.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return files if good else {}


def _is_good(found: _Known) -> bool:
    numbers = type(found.size) is int and type(found.modified) is int
    text = found.fingerprint
    return numbers and isinstance(text, str) and _FINGERPRINT.fullmatch(text) is not None
