"""Where statistics live: one file a model and session under `models/hswq`."""

from __future__ import annotations

import datetime
import logging
import os
import re
from pathlib import Path

import filelock
import folder_paths

from ..calibration import Statistics, StatisticsError, load_statistics, save_statistics

PASSIVE_SESSION = "recorded"
"""Session of the statistics that grow in the background."""

FOLDER = "hswq"
TARGET_SAMPLES = 256
USABLE_SAMPLES = 32
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
            found = load_statistics(path)
        except (StatisticsError, FileNotFoundError) as error:
            logging.warning("HSWQ: %s", error)
            continue
        if found.fingerprint == fingerprint:
            total = found if total is None else total.merge(found)
    return total


def add_statistics(
    delta: Statistics, fingerprint: str | None, session: str, model_name: str
) -> Statistics:
    """Add new sums to a model's file under its lock, and return the file's new content.

    Two processes that record the same model add up. A damaged file is set aside as `.damaged`.

    Raises:
        OSError: the file cannot be written; it is left as it was.
        ValueError: the file's layers have other shapes than the new ones.
    """
    path = statistics_path(fingerprint, session, model_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        total = _read_or_set_aside(path)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        meta = {"created_at": now, "model": model_name, "session": session}
        delta = Statistics(delta, {**meta, **delta.meta, "fingerprint": fingerprint})
        total = delta if total is None else total.merge(delta)
        total = Statistics(total, {**total.meta, "last_run": now})
        try:
            save_statistics(total, path)
        except OSError as error:  # of a full disk, it does not say which file
            raise OSError(f"{path.name} cannot be written: {error.strerror}") from error
    return total


def _read_or_set_aside(path: Path) -> Statistics | None:
    try:
        return load_statistics(path)
    except FileNotFoundError:
        return None
    except StatisticsError as error:
        aside = path.with_name(path.name + ".damaged")
        os.replace(path, aside)
        logging.warning("HSWQ: %s; it is kept as %s and a new one is begun", error, aside.name)
        return None
