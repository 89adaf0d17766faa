"""Where statistics live: one file a model and session under `models/hswq`."""

from __future__ import annotations

import datetime
import glob
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

import filelock
import folder_paths

from ..calibration import (
    LayerStatistics,
    Statistics,
    StatisticsError,
    load_statistics,
    save_statistics,
)
from . import settings

PASSIVE_SESSION = "recorded"
"""Session of the statistics that grow in the background."""

FOLDER = "hswq"
USABLE_SAMPLES = 32
_LOCK_SECONDS = 10  # a save takes a tenth of one
_CACHED_FILES = 4
_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHORT = 16  # hex digits of the fingerprint in a file's name


def register_folder() -> None:
    """Tell ComfyUI about the statistics folder; it is made when first written to."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, extensions | {".pt"})


def statistics_folder() -> Path:
    """Return the folder that statistics are written to."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def check_session(session: str) -> str:
    """Return a session name that is safe in a file name.

    Raises:
        ValueError: it is not letters, digits, `_` and `-`.
    """
    if not isinstance(session, str) or not _SESSION.fullmatch(session):
        raise ValueError(
            f"the session must be 1 to 64 letters, digits, '_' or '-', got {session!r}"
        )
    return session


def statistics_path(fingerprint: str | None, session: str, model_name: str) -> Path:
    """Return the file of one model and session; an existing one keeps the name it has.

    The statistics of a model without a fingerprint (a merge) are known by their session alone.
    """
    check_session(session)
    if fingerprint is None:
        return statistics_folder() / f"{session}.pt"
    for existing in statistics_files(fingerprint):
        if existing.name.endswith(f".{session}.pt"):
            return existing
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(model_name).stem)[:80] or "model"
    return statistics_folder() / f"{stem}.{fingerprint[:_SHORT]}.{session}.pt"


def statistics_files(fingerprint: str) -> list[Path]:
    """Return the statistics files of one model, of all its sessions, by name."""
    folder = statistics_folder()
    return sorted(folder.glob(f"*.{fingerprint[:_SHORT]}.*.pt")) if folder.is_dir() else []


def statistics_of(fingerprint: str) -> Statistics | None:
    """Return the sums of all sessions of one model, None where nothing was recorded.

    A damaged file is reported in the log and left out.
    """
    total = None
    for path in statistics_files(fingerprint):
        try:
            found = _load(path)
        except (StatisticsError, FileNotFoundError) as error:
            logging.warning("HSWQ: %s", error)
            continue
        if found.fingerprint == fingerprint:
            total = found if total is None else total.merge(found)
    return total


def target() -> int:
    """Return the samples at which passive recording ends."""
    return settings.current().target


def missing_layers(statistics: Statistics) -> int:
    """Return how many of the model's layers were never measured, as far as the file says."""
    layers = statistics.meta.get("layers")
    return max(0, layers - len(statistics)) if type(layers) is int else 0


def is_complete(statistics: Statistics) -> bool:
    """Whether passive recording is over: at the target, once every layer has been measured.

    A layer that was not by twice the target is one that this model does not call.
    """
    goal = 2 * target() if missing_layers(statistics) else target()
    return statistics.samples >= goal


def is_usable(statistics: Statistics) -> bool:
    """Whether a model can be quantized by what was recorded of it: of every layer, and enough."""
    measured = not missing_layers(statistics) or is_complete(statistics)
    return measured and statistics.samples >= USABLE_SAMPLES


def add_statistics(
    delta: Statistics,
    fingerprint: str | None,
    session: str,
    model_name: str,
    order: Iterable[str] = (),
) -> Statistics:
    """Add new sums to a model's file under its lock, and return the file's new content.

    Two processes that record the same model add up. A damaged file is set aside as `.damaged`.
    `order` names the model's layers as they come in it: that decides between equal
    sensitivities, and a sampling need not have measured all layers.

    Raises:
        OSError: the file cannot be written; it is left as it was.
        ValueError: the file's layers have other shapes than the new ones.
    """
    path = statistics_path(fingerprint, session, model_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
        _sweep(path)
        total = _read_or_set_aside(path)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        meta = {"created_at": now, "model": model_name, "session": session}
        delta = Statistics(delta, {**meta, **delta.meta, "fingerprint": fingerprint})
        total = delta if total is None else total.merge(delta)
        total = Statistics(_in_order(total, order), {**total.meta, "last_run": now})
        try:
            save_statistics(total, path)
        except OSError as error:  # of a full disk, it does not say which file
            raise OSError(f"{path.name} cannot be written: {error.strerror}") from error
        _remember(path, total)
    return total


def _in_order(statistics: Statistics, order: Iterable[str]) -> dict[str, LayerStatistics]:
    first = {name: statistics[name] for name in order if name in statistics}
    return {**first, **statistics}


def _read_or_set_aside(path: Path) -> Statistics | None:
    try:
        return _load(path)
    except FileNotFoundError:
        return None
    except StatisticsError as error:
        aside = path.with_name(path.name + ".damaged")
        os.replace(path, aside)
        logging.warning("HSWQ: %s; it is kept as %s and a new one is begun", error, aside.name)
        return None


def _sweep(path: Path) -> None:
    """Remove what a process that was killed has left beside a file; its lock is held."""
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        stray.unlink(missing_ok=True)


_cache: dict[Path, tuple[tuple, Statistics]] = {}


def _load(path: Path) -> Statistics:
    """Read a statistics file, or take what is known of it while it has not changed."""
    version = _version(path)
    known = _cache.get(path)
    if known is not None and known[0] == version:
        return known[1]
    statistics = load_statistics(path)
    if version == _version(path):
        _keep(path, version, statistics)
    return statistics


def _remember(path: Path, statistics: Statistics) -> None:
    """Know what was just written; the file's lock is held."""
    _keep(path, _version(path), statistics)


def _keep(path: Path, version: tuple, statistics: Statistics) -> None:
    _cache.pop(path, None)
    _cache[path] = version, statistics
    while len(_cache) > _CACHED_FILES:
        del _cache[next(iter(_cache))]


def _version(path: Path) -> tuple:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino
