"""Names and paths of statistics files."""

from __future__ import annotations

import re
from pathlib import Path

from ..files.names import is_reserved
from ..host.folders import statistics_folder

SHORT = 16
"""Hex digits of the fingerprint in a file's name."""

_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_session(session: str) -> str:
    """Return the session's name if it is safe as part of a file name.

    Raises:
        ValueError: it has something other than letters, digits, `_` and `-`, or it is reserved.
    """
    if not isinstance(session, str) or not _SESSION.fullmatch(session) or is_reserved(session):
        raise ValueError(
            "the session must be 1 to 64 letters, digits, '_' or '-', and not a name that an "
            f"operating system reserves, got {session!r}"
        )
    return session


def statistics_path(fingerprint: str | None, session: str, model_name: str) -> Path:
    """Return the file of one model and session. An existing file keeps its name.

    A model without a fingerprint (a merge) has one file a session, without its name.
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
    """Return the statistics files of all sessions of one model, sorted by name."""
    folder = statistics_folder()
    return sorted(folder.glob(f"*.{fingerprint[:SHORT]}.*.pt")) if folder.is_dir() else []
