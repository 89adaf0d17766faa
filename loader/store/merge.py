"""Merging recordings of other machines: all statistics files of a folder become one session."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ...calibration import Statistics, StatisticsError, load_statistics
from .. import store
from ..host.folders import FOLDER
from . import locked_file

ALL = "all"
"""Choice of a folder: all of models/hswq that "auto" does not count already."""

COUNTED = "counted already"


@dataclasses.dataclass(frozen=True)
class Gathered:
    """A written file that sums up the files of one model.

    Attributes:
        path: of the file.
        samples: number of latent images that it counts.
        files: number of files that were merged into it.
    """

    path: Path
    samples: int
    files: int


class _Source(NamedTuple):
    """A file to merge: its name among ComfyUI's, its path, and its meta without its layers."""

    name: str
    path: Path
    about: Statistics


def folders() -> list[str]:
    """Return the choices of `gather`: ALL, and each subfolder of models/hswq with statistics."""
    found = set()
    for name in folder_paths.get_filename_list(FOLDER):
        while name := os.path.dirname(name):
            found.add(name)
    return [ALL, *sorted(found)]


def gather(folder: str, session: str) -> tuple[list[Gathered], dict[str, str]]:
    """Sum up the statistics files of a folder, each model's in one file of a session.

    Nothing counts twice. The session's file is written from these files alone, so a user may
    gather again when there are more of them, or when some have grown. Of files that hold the same
    recording, only the largest counts; a recording that another session has does not count.

    Args:
        folder: one of `folders`.
        session: name of letters, digits, `_` and `-`; it must not have recordings of its own.

    Returns:
        The files that were written; and by name of each file left out, why it was.

    Raises:
        ValueError: there is no such folder, the session's name is not allowed, or no file is left
            to merge.
        OSError: a file cannot be written; it is unchanged.
    """
    store.check_session(session)
    if folder not in folders():
        raise ValueError(f"there is no folder {folder!r} with statistics in models/{FOLDER}")
    left_out: dict[str, str] = {}
    sources = list(_sources(folder, left_out))
    written = []
    for model in dict.fromkeys(source.about.fingerprint for source in sources):
        its = [source for source in sources if source.about.fingerprint == model]
        chosen = _uncounted(its, model, session)
        left_out.update((one.name, COUNTED) for one in its if one not in chosen)
        if chosen:
            written.append(_merge(chosen, session, left_out))
    if not written:
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"{folder!r} has no statistics that do not count already{reasons}")
    return written, left_out


def _sources(folder: str, left_out: dict[str, str]) -> Iterator[_Source]:
    """Yield the files of a folder, except those that are a session's already."""
    for name in folder_paths.get_filename_list(FOLDER):
        if folder != ALL and not name.startswith(folder + os.sep):
            continue
        path = Path(folder_paths.get_full_path_or_raise(FOLDER, name))
        try:
            found = load_statistics(path)
        except (StatisticsError, OSError) as error:
            left_out[name] = locked_file.unreadable(path, error)
            continue
        if found.fingerprint is None:
            left_out[name] = "it does not say which weights it is of"
        elif path not in store.statistics_files(found.fingerprint):
            meta = {"model": name, **found.meta}
            if not store.recordings(found):  # another tool wrote the file: it has no recording id
                meta[store.RECORDING] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            yield _Source(name, path, Statistics(meta=meta))


def _uncounted(sources: list[_Source], fingerprint: str, session: str) -> list[_Source]:
    """Return one model's files whose recordings no other session has, and no larger file."""
    target = store.statistics_path(fingerprint, session, "")
    counted: set[str] = set()
    for path in store.statistics_files(fingerprint):
        with contextlib.suppress(StatisticsError, OSError):  # an unreadable file does not count
            if path != target:  # which is about to be replaced, so that it does not count
                counted |= store.recordings(locked_file.read(path))
    new = [one for one in sources if counted.isdisjoint(store.recordings(one.about))]
    chosen = {id(about) for about in store.once_each(one.about for one in new)}
    return [one for one in new if id(one.about) in chosen]


def _merge(sources: list[_Source], session: str, left_out: dict[str, str]) -> Gathered:
    """Sum up the files of one model, one after the other, and write the session's file."""
    first, total, parts, sketches = sources[0].about, Statistics(), {}, []
    for source in sources:
        try:
            its = load_statistics(source.path)
            total = total.merge(its)
            parts[source.name] = source.about
            sketches.append(store.sketches_beside(source.path, its))
        except (ValueError, OSError) as error:
            left_out[source.name] = str(error)
    recordings = frozenset().union(*map(store.recordings, parts.values()))
    last_run = max((str(about.meta.get("last_run", "")) for about in parts.values()), default="")
    meta = {**total.meta, "model": str(first.meta["model"]), "last_run": last_run}
    meta.pop(store.RECORDING, None)
    meta.pop(store.SENT, None)
    meta[store.MERGED] = " ".join(sorted(recordings))
    found = [one for one in sketches if one is not None]
    path = store.replace_merged(Statistics(total, meta), session, found)
    return Gathered(path, total.samples, len(parts))
