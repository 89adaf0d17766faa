"""Heads: what a model's statistics files hold, without the channels' importances.

Importances are most of a file (8 MiB for SDXL) and needed only for quantizing, while the rest is
asked for often. So the rest is kept in memory, and on disk in one `.heads` file a model
(heads_file.py). It is valid as long as the same statistics files are there, unchanged.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...calibration import LayerStatistics, Statistics, StatisticsError, load_statistics
from ..files import owners
from ..host.folders import statistics_folder
from . import heads_file, locked_file
from .heads_file import FILE, NOTHING, Head, Heads, Session, Version
from .paths import SHORT
from .totals import OTHER_WEIGHTS, is_of, total_of

ID_DIGITS = SHORT
"""Digits of a model's id: those of its fingerprint that are in the names of its files."""

_FILES_IN_MEMORY = 64


class LateError(Exception):
    """There was no time to read all files."""


_known: dict[Path, Heads] = {}
_files: collections.OrderedDict[Path, tuple[Version, Statistics | str]] = collections.OrderedDict()
_lock = threading.Lock()  # for _files: the panel and samplings read in different threads


def ids() -> dict[str, list[Path]]:
    """Return all statistics files by their models' ids, ordered by the files' names."""
    found: dict[str, list[Path]] = {}
    for path in sorted(statistics_folder().glob("*.pt")):
        match = FILE.fullmatch(path.name)
        if match is not None:
            found.setdefault(match["id"], []).append(path)
    return found


def head_of(fingerprint: str) -> Head | None:
    """Return what was recorded of a model; None if nothing was."""
    heads = heads_of(fingerprint[:ID_DIGITS])
    return next((head for head in heads.models if head.fingerprint == fingerprint), None)


def heads_of(
    its_id: str,
    paths: Iterable[Path] | None = None,
    *,
    keep: bool = False,
    until: float = math.inf,
) -> Heads:
    """Return what the files of an id hold. Only files that have changed are read.

    Args:
        its_id: first digits of a fingerprint.
        paths: its statistics files; None lists the folder.
        keep: if files had to be read, write the result to disk for ComfyUI's next start.
        until: of time.monotonic(). Later no more files are read.

    Raises:
        LateError: files are left to be read. Those that were read need not be read again.
    """
    if paths is None:
        paths = sorted(statistics_folder().glob(f"*.{its_id}.*.pt"))
        paths = [path for path in paths if FILE.fullmatch(path.name)]
    versions, problems = _versions(paths)
    where = _path(its_id)
    if where not in _known and time.monotonic() > until:
        raise LateError
    for heads in (_known.get(where), heads_file.read(where) if where not in _known else None):
        if heads is not None and heads.versions == versions and not problems and _agree(heads):
            _known[where] = heads
            return heads
    heads = _known[where] = _read(its_id, versions, problems, until)
    if keep and heads.models and not heads.problems:
        heads_file.write(where, heads)
    return heads


def forget(fingerprint: str) -> None:
    """Remove a model's heads from memory and disk."""
    path = _path(fingerprint[:ID_DIGITS])
    _known.pop(path, None)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _versions(paths: Iterable[Path]) -> tuple[dict[str, Version], list[str]]:
    found, problems = {}, []
    for path in paths:
        try:
            found[path.name] = locked_file.version_of(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(locked_file.unreadable(path, error))
    return found, problems


def _read(its_id: str, versions: Mapping[str, Version], problems: list[str], until: float) -> Heads:
    """Read the files of an id, and sum them up by model."""
    models: dict[str, list[tuple[Session, Statistics]]] = {}
    problems = list(problems)
    for name, version in versions.items():
        path = statistics_folder() / name
        if time.monotonic() > until and _is_left(path, version, len(versions)):
            raise LateError
        statistics = _without_importances(path, version)
        if isinstance(statistics, str):
            problems.append(statistics)
        elif statistics is None or not (statistics.fingerprint or "").startswith(its_id):
            continue
        elif not is_of(statistics, statistics.fingerprint):
            problems.append(f"{name} {OTHER_WEIGHTS}")
        else:
            session = Session(path, version[1], Statistics(meta=statistics.meta))
            models.setdefault(statistics.fingerprint, []).append((session, statistics))
    heads = [
        Head(its, tuple(one for one, _ in found), total_of([sums for _, sums in found]))
        for its, found in models.items()
    ]
    return Heads(dict(versions), tuple(heads), tuple(problems))


def _is_left(path: Path, version: Version, count: int) -> bool:
    """Whether a file must be read, and what was read of its model so far is not lost by waiting."""
    known = _files.get(path)
    return count <= _FILES_IN_MEMORY and (known is None or known[0] != version)


def _agree(heads: Heads) -> bool:
    """Whether no file is known by now to be of other weights."""
    all_of = ((of.fingerprint, one.about.meta) for of in heads.models for one in of.sessions)
    stated = {(its, meta.get(owners.WHOLE)) for its, meta in all_of}
    return all(owners.agrees(*one) for one in stated)


def _without_importances(path: Path, version: Version) -> Statistics | str | None:
    """Return a file's sums without importances.

    A file that cannot be read gives a sentence that says why; one that is gone gives None.
    """
    with _lock:
        known = _files.get(path)
        if known is not None and known[0] == version:
            _files.move_to_end(path)
            return known[1]
    try:
        statistics = locked_file.known(path) or load_statistics(path)
    except FileNotFoundError:
        return None
    except (StatisticsError, OSError) as error:
        found = locked_file.unreadable(path, error)
        logging.warning("HSWQ: %s", found)
    else:
        found = Statistics({n: _bare(layer) for n, layer in statistics.items()}, statistics.meta)
    with _lock:
        _files[path] = version, found
        while len(_files) > _FILES_IN_MEMORY:
            _files.popitem(last=False)
    return found


def _bare(layer: LayerStatistics) -> LayerStatistics:
    return dataclasses.replace(layer, importance_sum=NOTHING)


def _path(its_id: str) -> Path:
    return statistics_folder() / "plans" / f"{its_id}.heads"
