"""Where statistics live: one file a model and session under `models/hswq`."""

from __future__ import annotations

import datetime
import functools
import logging
import os
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ...calibration import LayerStatistics, Statistics, StatisticsError
from ..files.names import is_reserved
from ..host import settings
from ..host.events import changed
from ..host.folders import statistics_folder
from . import locked_file

PASSIVE_SESSION = "recorded"
"""Session of the statistics that grow in the background."""

RECORDING, MERGED = "recording", "merged"
"""In a file's meta: the id of what was recorded into it, and the ids that were merged into it."""

USABLE_SAMPLES = 32
_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHORT = 16  # hex digits of the fingerprint in a file's name


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
    return statistics_folder() / f"{stem}.{fingerprint[:_SHORT]}.{session}.pt"


def statistics_files(fingerprint: str) -> list[Path]:
    """Return the statistics files of one model, of all its sessions, by name."""
    folder = statistics_folder()
    return sorted(folder.glob(f"*.{fingerprint[:_SHORT]}.*.pt")) if folder.is_dir() else []


def statistics_of(fingerprint: str) -> Statistics | None:
    """Return the sums of all sessions of one model, None where nothing was recorded.

    A damaged file is reported in the log and left out. So is the smaller of two that sum up the
    same recording, as a merged file and one that was merged into it: nothing counts twice.
    """
    found = []
    for path in statistics_files(fingerprint):
        try:
            statistics = locked_file.read(path)
        except (StatisticsError, FileNotFoundError) as error:
            logging.warning("HSWQ: %s", error)
            continue
        if statistics.fingerprint == fingerprint:
            found.append(statistics)
    return total_of(found)


def total_of(found: Sequence[Statistics]) -> Statistics | None:
    """Return the sums of a model's files, each recording once; None of no files."""
    counted = {id(statistics) for statistics in once_each(found)}
    parts = [statistics for statistics in found if id(statistics) in counted]
    return functools.reduce(Statistics.merge, parts) if parts else None


def recordings(statistics: Statistics) -> frozenset[str]:
    """Return which recordings a file sums up: its own, and those that were merged into it."""
    own, merged = (statistics.meta.get(key) for key in (RECORDING, MERGED))
    return frozenset(f"{own or ''} {merged or ''}".split())


def once_each(found: Iterable[Statistics]) -> list[Statistics]:
    """Return those to count, the largest first, so that no recording counts twice."""
    counted: set[str] = set()
    chosen = []
    for statistics in sorted(found, key=lambda one: -one.samples):
        its = recordings(statistics)
        if counted.isdisjoint(its):
            chosen.append(statistics)
            counted |= its
    return chosen


def state() -> tuple[int, int]:
    """Return what changes when a model that was complete may be so no more."""
    try:
        return target(), os.stat(statistics_folder()).st_mtime_ns
    except FileNotFoundError:
        return target(), 0


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
    order: Collection[str] = (),
) -> Statistics:
    """Add new sums to a model's file under its lock, and return the file's new content.

    Two processes that record the same model add up. A damaged file is set aside as `.damaged`.
    `order` names the model's layers as they come in it: that decides between equal
    sensitivities, and a sampling need not have measured all layers. Others are dropped.

    Raises:
        OSError: the file cannot be written; it is left as it was.
        ValueError: the file's layers have other shapes than the new ones.
    """
    path = statistics_path(fingerprint, session, model_name)
    with locked_file.locked(path):
        total = locked_file.read_or_set_aside(path)
        now = _now()
        meta = {"created_at": now, "model": model_name, "session": session}
        meta[RECORDING] = secrets.token_hex(8)
        delta = Statistics(delta, {**meta, **delta.meta, "fingerprint": fingerprint})
        total = delta if total is None else total.merge(delta)
        known = {"layers": len(order)} if order else {}
        total = Statistics(_of_model(total, order), {**total.meta, **known, "last_run": now})
        locked_file.write(total, path)
    changed()
    return total


def replace_merged(merged: Statistics, session: str) -> Path:
    """Write statistics that sum up other recordings as a session's file; return its path.

    Args:
        merged: has `model`, `fingerprint` and MERGED in its meta.
        session: its file may be there, from merging before.

    Raises:
        OSError: the file cannot be written; it is left as it was.
        ValueError: something was recorded into that session, which would be lost.
    """
    path = statistics_path(merged.fingerprint, session, merged.meta["model"])
    with locked_file.locked(path):
        before = locked_file.read_or_set_aside(path)
        if before is not None and (RECORDING in before.meta or MERGED not in before.meta):
            raise ValueError(f"session {session!r} has recordings of its own: choose another name")
        same = before is not None and before.meta[MERGED] == merged.meta[MERGED]
        created = before.meta.get("created_at") if same else None
        meta = {**merged.meta, "session": session, "created_at": created or _now()}
        locked_file.write(Statistics(merged, meta), path)
    changed()
    return path


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _of_model(statistics: Statistics, order: Collection[str]) -> dict[str, LayerStatistics]:
    """Keep the model's own layers, where they are known: a node may have put in others."""
    if not order:
        return dict(statistics)
    return {name: statistics[name] for name in order if name in statistics}


def remove_statistics(fingerprint: str, session: str | None = None) -> int:
    """Remove what was recorded of a model, in one session or in all; return how many files.

    Each under its lock, so that what another process is about to add begins a new file. Locks stay:
    without them, who waits for one would not lock out who comes later.

    Raises:
        OSError: a file cannot be removed, or another process keeps its lock.
    """
    removed = 0
    for path in statistics_files(fingerprint):
        if session is None or path.name.endswith(f".{session}.pt"):
            with locked_file.locked(path):
                removed += path.exists()
                path.unlink(missing_ok=True)
                path.with_name(path.name + locked_file.DAMAGED).unlink(missing_ok=True)
    changed()
    return removed
