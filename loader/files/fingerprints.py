"""The fingerprints of model files, cached on disk: computing one for SDXL takes 2,600 seeks."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import comfyui_version
import folder_paths
import safetensors

from ...calibration import atomic_file
from ...calibration.regular import open_regular
from ..host.folders import FOLDER, statistics_folder
from . import owners
from .errors import ModelFileError
from .model_file import ModelFile, opened
from .versions import is_settled, version_of
from .whole_hash import used

DAMAGED = "damaged"
"""Cached in place of a fingerprint for a damaged file."""

_FORMAT = 2  # of the cache file, and of the fingerprints in it
_MAX_BYTES = 16 << 20
_JUDGES = f"safetensors {safetensors.__version__}, ComfyUI {comfyui_version.__version__}"
"""The versions that call a file damaged: other versions may be able to read it."""
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class _Known(NamedTuple):
    """A fingerprint or DAMAGED, and the file's version for which it holds."""

    modified: int
    size: int
    inode: int
    changed: int
    fingerprint: str


def fingerprint(file: ModelFile | str) -> str:
    """Return a hash that identifies the diffusion model's weights in a file, and note its use.

    It is ModelFile.read_fingerprint, whatever the file's name, but each version of a file is read
    only once. A file with the same samples as another, but other weights, gets a hash of its own
    once both were read whole; see `owners`.

    Raises:
        OSError: the file is gone.
        ModelFileError: the file is damaged, or holds no tensors.
    """
    file = opened(file)
    return used(_sampled(file), file.path)


def looked_up(path: str) -> str:
    """Return a file's fingerprint as `fingerprint` does, without noting a use of the file."""
    return owners.resolved(_sampled(ModelFile(path)), path, version_of(path))


def is_decided(file: ModelFile) -> bool:
    """Whether it is known that a file's fingerprint is not that of another file's weights.

    Raises:
        OSError, ModelFileError: as for `fingerprint`.
    """
    return owners.is_decided(_sampled(file), file.path, version_of(file.path))


def known(path: str) -> str | None:
    """Return a file's cached fingerprint or DAMAGED; None if the file would have to be read.

    Raises:
        OSError: the file is gone.
    """
    found = _known(path)
    return found if found in (None, DAMAGED) else owners.resolved(found, path, version_of(path))


def _sampled(file: ModelFile) -> str:
    """Return the fingerprint of a file's samples, from the cache or by reading them."""
    found = _known(file.path)
    return _read(file) if found in (None, DAMAGED) else found


def _known(path: str) -> str | None:
    version = version_of(path)
    with _lock:
        found = _all(_file()).get(os.path.realpath(path))
    return found.fingerprint if found is not None and found[:-1] == version else None


def _read(file: ModelFile) -> str:
    path = file.path
    version = version_of(path)
    settled = is_settled(version)  # before reading, which may take longer
    try:
        found = file.read_fingerprint()
    except ModelFileError:
        if settled:
            _remember(path, _Known(*version, DAMAGED))
        raise
    if settled:
        _remember(path, _Known(*version, found))
    return found


_lock = threading.Lock()  # for the result of `_all`: prompts and routes run in different threads


@functools.cache
def _all(file: Path | None) -> dict[str, _Known]:
    """Return the cache in memory, by real path. At the first call it is read from disk."""
    return {} if file is None else _kept(file)


def _file() -> Path | None:
    """Return the path of the cache; None in a script that has not registered the folder."""
    registered = FOLDER in folder_paths.folder_names_and_paths
    return statistics_folder() / "plans" / "fingerprints.cache" if registered else None


def _remember(path: str, found: _Known) -> None:
    with _lock:
        file = _file()
        _all(file)[os.path.realpath(path)] = found
        if file is not None:
            _keep(file)


def _keep(file: Path) -> None:
    """Write the entries of files that still exist.

    Entries may be lost, if writing fails or two processes write at once: then those files are read
    again.
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
    """Read the cache from disk; {} if it is damaged."""
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
