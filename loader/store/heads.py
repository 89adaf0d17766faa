"""Heads: what a model's statistics files hold, without the channels' importances.

Importances are most of a file (8 MiB for SDXL) and needed only for quantizing, while the rest is
asked for often. So the rest is kept in memory, and on disk in two files a model (heads_file.py):
`.heads` has the total, and is valid as long as the same statistics files are there, unchanged.
`.files` has each file's own sums, from which a total is made when some of the files have changed.
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
_FILES = ".files"


class LateError(Exception):
    """There was no time to read all files."""


_known: dict[Path, Heads] = {}
_files: collections.OrderedDict[Path, tuple[Version, Statistics | str]] = collections.OrderedDict()
_on_disk: dict[Path, dict[str, Version]] = {}
"""Versions of the statistics files whose sums are kept, by the file that keeps them."""

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
    heads = _known[where] = _read(its_id, versions, problems, until, keep=keep)
    if keep and heads.models and not heads.problems:
        heads_file.write(where, heads)
    return heads


def forget(fingerprint: str) -> None:
    """Remove a model's heads from memory and disk."""
    path = _path(fingerprint[:ID_DIGITS])
    _known.pop(path, None)
    for one in (path, path.with_suffix(_FILES)):
        _on_disk.pop(one, None)
        with contextlib.suppress(OSError):
            one.unlink(missing_ok=True)


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


def _read(
    its_id: str, versions: Mapping[str, Version], problems: list[str], until: float, *, keep: bool
) -> Heads:
    """Read the files of an id as far as their sums are not known, and sum them up by model."""
    models: dict[str, list[tuple[Session, Statistics]]] = {}
    problems, found = list(problems), _sums_of(its_id, versions, until, keep=keep)
    for name, statistics in found.items():
        if isinstance(statistics, str):
            problems.append(statistics)
        elif not (statistics.fingerprint or "").startswith(its_id):
            continue
        elif not is_of(statistics, statistics.fingerprint):
            problems.append(f"{name} {OTHER_WEIGHTS}")
        else:
            path, about = statistics_folder() / name, Statistics(meta=statistics.meta)
            session = Session(path, versions[name][1], about)
            models.setdefault(statistics.fingerprint, []).append((session, statistics))
    heads = [
        Head(its, tuple(one for one, _ in of), total_of([sums for _, sums in of]))
        for its, of in models.items()
    ]
    return Heads(dict(versions), tuple(heads), tuple(problems))


def _sums_of(
    its_id: str, versions: Mapping[str, Version], until: float, *, keep: bool
) -> dict[str, Statistics | str]:
    """Return files' sums without importances, by the files' names: from memory, disk, or the file.

    A file that cannot be read gives a sentence that says why; one that is gone gives nothing.
    If `keep`, and more files have changed than the one that a sampling changes, they are kept.
    """
    found, where = {}, _path(its_id).with_suffix(_FILES)
    kept = None
    for name, version in versions.items():
        path = statistics_folder() / name
        statistics = _in_memory(path, version)
        if statistics is None:
            if kept is None:
                kept = heads_file.read_files(where)
                _on_disk[where] = {its: of for its, (of, _) in kept.items()}
            before, statistics = kept.get(name, (None, None))
            if before != version:
                if time.monotonic() > until and len(versions) <= _FILES_IN_MEMORY:
                    raise LateError  # what was read so far is not lost by waiting
                statistics = _without_importances(path)
            _remember(path, version, statistics)
        if statistics is not None:
            found[name] = statistics
    whole = {its: (versions[its], of) for its, of in found.items() if not isinstance(of, str)}
    changed = [its for its, (of, _) in whole.items() if _on_disk.get(where, {}).get(its) != of]
    if keep and len(changed) > 1:
        heads_file.write_files(where, whole)
        _on_disk[where] = {its: of for its, (of, _) in whole.items()}
    return found


def _agree(heads: Heads) -> bool:
    """Whether no file is known by now to be of other weights."""
    all_of = ((of.fingerprint, one.about.meta) for of in heads.models for one in of.sessions)
    stated = {(its, meta.get(owners.WHOLE)) for its, meta in all_of}
    return all(owners.agrees(*one) for one in stated)


def _in_memory(path: Path, version: Version) -> Statistics | str | None:
    """Return a file's sums without importances, or what is wrong with it; None if unknown."""
    with _lock:
        known = _files.get(path)
        if known is not None and known[0] == version:
            _files.move_to_end(path)
            return known[1]
    with contextlib.suppress(OSError):
        whole = locked_file.known(path)
        if whole is not None:
            _remember(path, version, bare := _without(whole))
            return bare
    return None


def _remember(path: Path, version: Version, found: Statistics | str | None) -> None:
    if found is None:
        return
    with _lock:
        _files[path] = version, found
        while len(_files) > _FILES_IN_MEMORY:
            _files.popitem(last=False)


def _without_importances(path: Path) -> Statistics | str | None:
    """Read a file. If it cannot be read, return a sentence that says why; None if it is gone."""
    try:
        return _without(load_statistics(path))
    except FileNotFoundError:
        return None
    except (StatisticsError, OSError) as error:
        problem = locked_file.unreadable(path, error)
        logging.warning("HSWQ: %s", problem)
        return problem


def _without(statistics: Statistics) -> Statistics:
    return Statistics({n: _bare(layer) for n, layer in statistics.items()}, statistics.meta)


def _bare(layer: LayerStatistics) -> LayerStatistics:
    return dataclasses.replace(layer, importance_sum=NOTHING)


def _path(its_id: str) -> Path:
    return statistics_folder() / "plans" / f"{its_id}.heads"
