"""What statistics files are called."""

from __future__ import annotations

import re
from pathlib import Path

from ..files.names import is_reserved
from ..host.folders import statistics_folder

SHORT = 16
"""Hex digits of the fingerprint in a file's name."""

_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_session(session: str) -> str:
    """Return a session name that is safe in a file name.

    Raises:
        ValueError: it is not letters, digits, `_` and `-`.
    """
    if not isinstance(session, str) or not _SESSION.fullmatch(session) or is_reserved(session):
        raise ValueError(
            "the session must be 1 to 64 letters, digits, '_' or '-', and no name that a system "
            f"reserves, got {session!r}"
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
    stem = f"_{stem}" if is_reserved(stem) else stem
    return statistics_folder() / f"{stem}.{fingerprint[:SHORT]}.{session}.pt"


def statistics_files(fingerprint: str) -> list[Path]:
    """Return the statistics files of one model, of all its sessions, by name."""
    folder = statistics_folder()
    return sorted(folder.glob(f"*.{fingerprint[:SHORT]}.*.pt")) if folder.is_dir() else []
