"""Which file a fingerprint belongs to, if two files with different weights have the same one.

This can happen because a fingerprint covers only a sample of each tensor. It belongs to the file
that was used first, and to all files with the same bytes. A file with other bytes gets another
fingerprint as soon as the hashes over all bytes of both files are known. Until then, that file is
undecided.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import filelock
import folder_paths

from ..host.folders import FOLDER, statistics_folder
from . import kept_json
from .versions import version_of

WHOLE = "weights"
"""Key of a statistics file's meta: the hash over all bytes of the weights that were recorded."""

_FORMAT = 1
_LOCK_SECONDS = 2
_HASH = re.compile(r"[0-9a-f]{64}")

Version = tuple[int, int, int, int]


class Owner(NamedTuple):
    """The file that a fingerprint belongs to.

    Attributes:
        path: of the file, without links.
        version: of the file when it was first used.
        whole: hash over all bytes of its weights; None if it is not known yet.
    """

    path: str
    version: Version
    whole: str | None


class _Known(NamedTuple):
    """Hashes over all bytes by real path, and owners by fingerprint."""

    hashes: Mapping[str, tuple[Version, str]]
    owners: Mapping[str, Owner]


def resolved(fingerprint: str, path: str, version: Version) -> str:
    """Return a file's own fingerprint: another than the given one if that is another file's.

    Args:
        fingerprint: of the file's samples, or an earlier result of this function.
        path, version: of the file.
    """
    known = _now()
    owner, whole = known.owners.get(fingerprint), _whole(known, path, version)
    if owner is None or None in (owner.whole, whole) or owner.whole == whole:
        return fingerprint
    return hashlib.sha256(f"{fingerprint}\0{whole}".encode()).hexdigest()


def is_decided(fingerprint: str, path: str, version: Version) -> bool:
    """Whether it is known that a fingerprint is a file's own. For the arguments see `resolved`."""
    known = _now()
    owner = known.owners.get(fingerprint)
    if owner is None or owner[:2] == (os.path.realpath(path), tuple(version)):
        return True
    return None not in (owner.whole, _whole(known, path, version))


def whole_of(path: str, version: Version) -> str | None:
    """Return the hash over all bytes of a file's weights; None if it is not known yet."""
    return _whole(_now(), path, version)


def agrees(fingerprint: str, stated: object) -> bool:
    """Whether statistics with a hash in their meta may be of the file that a fingerprint is of."""
    owner = _now().owners.get(fingerprint)
    return stated is None or owner is None or owner.whole in (None, stated)


def owner_of(fingerprint: str) -> Owner | None:
    """Return the file that a fingerprint belongs to; None if no file was used yet."""
    return _now().owners.get(fingerprint)


def claim(fingerprint: str, path: str, version: Version) -> None:
    """Note that a file is used. A fingerprint belongs to the first file that was used.

    If that file was removed or overwritten before it was hashed, the fingerprint belongs to the
    next file that is used.
    """
    if not _is_free(_now().owners.get(fingerprint), path, version):
        return

    def change(known: _Known) -> _Known | None:
        if not _is_free(known.owners.get(fingerprint), path, version):
            return None
        owner = Owner(os.path.realpath(path), tuple(version), _whole(known, path, version))
        return known._replace(owners={**known.owners, fingerprint: owner})

    _change(change)


def note(path: str, version: Version, whole: str) -> None:
    """Keep the hash over all bytes of a file's weights, and remove entries of missing files."""
    real = os.path.realpath(path)

    def change(known: _Known) -> _Known:
        there = {one: its for one, its in known.hashes.items() if os.path.exists(one)}
        owners = {
            its: owner._replace(whole=whole) if owner == (real, tuple(version), None) else owner
            for its, owner in known.owners.items()
        }
        return _Known({**there, real: (tuple(version), whole)}, owners)

    _change(change)


def _is_free(owner: Owner | None, path: str, version: Version) -> bool:
    if owner is None:
        return True
    same = owner[:2] == (os.path.realpath(path), tuple(version))
    return owner.whole is None and not same and not _is_there(owner)


def _is_there(owner: Owner) -> bool:
    try:
        return version_of(owner.path) == owner.version
    except OSError:
        return False


def _whole(known: _Known, path: str, version: Version) -> str | None:
    its, whole = known.hashes.get(os.path.realpath(path), (None, None))
    return whole if its == tuple(version) else None


_lock = threading.Lock()  # for _kept: prompts, routes and hashing run in different threads
_NOTHING = _Known({}, {})
_kept: tuple[Path | None, Version | None, _Known] = None, None, _NOTHING


def _file() -> Path | None:
    """Return the path of the cache; None in a script that has not registered the folder."""
    registered = FOLDER in folder_paths.folder_names_and_paths
    return statistics_folder() / "weights.cache" if registered else None


def _now() -> _Known:
    """Return all that is known. The cache is read again only if its file has changed."""
    global _kept
    with _lock:
        path = _file()
        version = _version(path)
        if (path, version) != _kept[:2] or (path is not None and version is None):
            _kept = path, version, _read(path)
        return _kept[2]


def _change(change: Callable[[_Known], _Known | None]) -> None:
    """Let a function change what is known, in memory and on disk, under a lock."""
    global _kept
    path = _file()
    if path is None:
        with _lock:
            _kept = None, None, change(_kept[2]) or _kept[2]
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            known = change(_now())
            if known is not None:
                kept_json.write(path, {"format": _FORMAT, **known._asdict()})
    except (OSError, filelock.Timeout) as error:
        logging.debug("HSWQ: the files that fingerprints belong to are not kept: %s", error)


def _version(path: Path | None) -> Version | None:
    try:
        return None if path is None else version_of(path)
    except OSError:
        return None


def _read(path: Path | None) -> _Known:
    """Read the cache from disk; nothing if it is missing or damaged."""
    try:
        content = kept_json.read(path)
        hashes = {one: (tuple(its), whole) for one, (its, whole) in content["hashes"].items()}
        owners = {
            its: Owner(one, tuple(version), whole)
            for its, (one, version, whole) in content["owners"].items()
        }
        good = content["format"] == _FORMAT and all(
            _is_version(version) and (whole is None or _HASH.fullmatch(whole))
            for version, whole in (*hashes.values(), *(owner[1:] for owner in owners.values()))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _NOTHING
    return _Known(hashes, owners) if good else _NOTHING


def _is_version(version: tuple) -> bool:
    return len(version) == 4 and all(type(number) is int for number in version)
