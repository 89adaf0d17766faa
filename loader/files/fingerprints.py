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

import comfyui_version
import folder_paths
import safetensors

from ...calibration import atomic_file
from ...calibration.regular import open_regular
from ..host.folders import FOLDER, statistics_folder
from .errors import ModelFileError
from .model_file import ModelFile, opened
from .versions import version_of

DAMAGED = "damaged"
"""What is known of a file that has no fingerprint."""

_FORMAT = 2  # of the kept file, and of the fingerprints in it
_MAX_BYTES = 16 << 20
_TICK_SECONDS = 2  # of FAT's clock, the coarsest: a later change may leave the time as it is
_JUDGES = f"safetensors {safetensors.__version__}, ComfyUI {comfyui_version.__version__}"
"""Who says what is damaged: what these cannot read, others may."""
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class _Known(NamedTuple):
    """A fingerprint or DAMAGED, and the version of the file that it is of."""

    modified: int
    size: int
    inode: int
    changed: int
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
    version = version_of(path)
    with _lock:
        found = _all(_file()).get(os.path.realpath(path))
    return found.fingerprint if found is not None and found[:-1] == version else None


def _read(file: ModelFile) -> str:
    path = file.path
    began, version = time.time(), version_of(path)
    settled = abs(began - version[0] / 1e9) > _TICK_SECONDS
    try:
        found = file.read_fingerprint()
    except ModelFileError:
        if settled:
            _remember(path, _Known(*version, DAMAGED))
        raise
    if settled:
        _remember(path, _Known(*version, found))
    return found


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
        if file is not None:
            _keep(file)


def _keep(file: Path) -> None:
    """Write what is known of files that are still there; where that fails they are read again.

    Likewise what two processes that write at once lose of each other's.
    """
    files = {
        path: found for path, found in {**_kept(file), **_all(file)}.items() if os.path.exists(path)
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as stream:
            content = {"format": _FORMAT, "judges": _JUDGES, "files": files}
            stream.write(json.dumps(content).encode())
    except OSError as error:
        logging.debug("HSWQ: fingerprints are not kept: %s", error)


def _kept(file: Path) -> dict[str, _Known]:
    """Read what is kept; nothing, where the file is not as `_keep` writes it."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            content = json.loads(stream.read(min(_MAX_BYTES, size)))
        files = {path: _Known(*facts) for path, facts in content["files"].items()}
        good = content["format"] == _FORMAT and all(map(_is_good, files.values()))
        agreed = content["judges"] == _JUDGES
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    if not good:
        return {}
    return {path: found for path, found in files.items() if agreed or found.fingerprint != DAMAGED}


def _is_good(found: _Known) -> bool:
    numbers = all(type(number) is int for number in found[:-1])
    text = found.fingerprint
    known = isinstance(text, str) and (text == DAMAGED or _FINGERPRINT.fullmatch(text) is not None)
    return numbers and known
