"""Statistics on disk: one file a model and session, in `models/hswq`."""

from __future__ import annotations

import datetime
import logging
import os
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path

from ...calibration import LayerStatistics, Statistics, StatisticsError
from ..host.events import changed
from ..host.folders import statistics_folder
from . import heads, later, locked_file, milestones, refined, sketch_file, waiting
from .paths import SHORT, statistics_files, statistics_path
from .readiness import milestone, target
from .sketches import hold_sketches, replace_sketches
from .totals import MERGED, RECORDING, is_of, total_of
from .waiting import NewSums

PASSIVE_SESSION = "recorded"
"""Name of the session that is recorded in the background."""

_MANY = 4
"""Files of a model, from which on reading all of them takes longer than a user waits for."""


def statistics_of(fingerprint: str) -> Statistics | None:
    """Return the sums of all sessions of one model; None if nothing was recorded.

    A file that cannot be read is reported in the log and left out. No recording counts twice: if
    two files hold the same one, such as a merged file and a file that was merged into it, only the
    larger file counts.
    """
    found = []
    for path in statistics_files(fingerprint):
        later.go_on()
        try:
            statistics = locked_file.read(path)
        except (StatisticsError, OSError) as error:
            logging.warning("HSWQ: %s", locked_file.unreadable(path, error))
            continue
        if is_of(statistics, fingerprint):
            found.append(statistics)
    return total_of(found)


def quantizing_statistics(
    fingerprint: str, patience: float | None = None, *, write: bool = True
) -> Statistics | None:
    """Return the statistics to quantize a model by: those of its last milestone.

    Before the first milestone it is all that was recorded, without importances; `is_usable`
    refuses that. For `patience` see locked_file.locked. Without `write`, a milestone that is not on
    disk yet is not written.
    """
    head = heads.head_of(fingerprint)
    if head is None or not milestone(head.total):
        return head and head.total
    kept = milestones.kept_of(fingerprint, head.total)
    if kept is None:
        later.wait_for(fingerprint)
        kept = milestones.kept_of(fingerprint, head.total)
    if kept is not None:
        return kept
    total = statistics_of(fingerprint)  # only now are all files read
    if total is None or not write:
        return total
    return milestones.at_milestone(fingerprint, total, patience)


def quantizing_sketches(fingerprint: str, *, write: bool = True) -> sketch_file.SketchFile | None:
    """Return the sketches that belong to `quantizing_statistics`; None if there are none."""
    kept = quantizing_statistics(fingerprint, write=write)
    return None if kept is None or not milestone(kept) else milestones.kept_sketches(kept)


def state() -> tuple[int, int]:
    """Return a value that changes when a model that was complete may no longer be complete."""
    try:
        return target(), os.stat(statistics_folder()).st_mtime_ns
    except FileNotFoundError:
        return target(), 0


def add_statistics(new: NewSums, patience: float | None = None) -> Statistics:
    """Add new sums to a model's file under its lock, and return the file's new content.

    Two processes that record the same model add up. A damaged file is set aside as `.damaged`.
    Sketches may be written later; an error about them does not affect the sums.
    For `patience` see locked_file.locked.

    Raises:
        OSError: the file cannot be written, or is locked; it is unchanged.
        ValueError: the file's layers have different shapes than the new ones.
    """
    path = statistics_path(new.fingerprint, new.session, new.model_name)
    with locked_file.locked(path, patience):
        total = sum_of(locked_file.read_or_set_aside(path), new)
        locked_file.write(total, path)
    if new.fingerprint is not None:
        _keep_heads(new.fingerprint)
    if new.sketches:  # before the milestone is kept, so that its copy has them
        try:
            hold_sketches(new.sketches, total, path, new.delta.samples)
        except ValueError as error:
            logging.warning("HSWQ: the sampling's sketches are not used: %s", error)
    if new.fingerprint is not None:
        _keep_milestone(new.fingerprint, patience)
    changed()
    return total


def sum_of(before: Statistics | None, new: NewSums) -> Statistics:
    """Return a file's content with new sums added; `before` is None if there is no file."""
    now = _now()
    meta = {"created_at": now, "model": new.model_name, "session": new.session}
    meta[RECORDING] = secrets.token_hex(8)
    delta = Statistics(new.delta, {**meta, **new.delta.meta, "fingerprint": new.fingerprint})
    total = delta if before is None else before.merge(delta)
    known = {"layers": len(new.order)} if new.order else {}
    return Statistics(_of_model(total, new.order), {**total.meta, **known, "last_run": now})


def replace_merged(
    merged: Statistics, session: str, sketches: Sequence[sketch_file.SketchFile] = ()
) -> Path:
    """Write statistics that sum up other recordings as a session's file; return its path.

    Args:
        merged: has `model`, `fingerprint` and MERGED in its meta.
        session: its file is replaced if it was merged too.
        sketches: of the files that were merged.

    Raises:
        OSError: the file cannot be written; it is unchanged.
        ValueError: the session has recordings of its own, which would be lost; or a layer's
            sketches have different numbers of input channels.
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
    replace_sketches(path, sketches)
    _keep_milestone(merged.fingerprint)
    changed()
    return path


def _keep_heads(fingerprint: str) -> None:
    """Keep what many files hold together, so that ComfyUI's next start need not read them all."""
    if len(statistics_files(fingerprint)) > _MANY:
        heads.heads_of(fingerprint[:SHORT], keep=True)


def _keep_milestone(fingerprint: str, patience: float | None = None) -> None:
    """Keep a copy of the statistics if a milestone was reached.

    Where many files must be read for that, it is done later.
    """
    if len(statistics_files(fingerprint)) <= _MANY:
        _keep_now(fingerprint, patience)
        return

    def work() -> None:
        _keep_now(fingerprint)
        changed()

    head = heads.head_of(fingerprint)
    reached = head is not None and milestone(head.total)
    if reached and milestones.kept_of(fingerprint, head.total) is None:
        later.do_later(fingerprint, work)


def _keep_now(fingerprint: str, patience: float | None = None) -> None:
    """Errors are only logged, because the new sums are on disk already."""
    try:
        quantizing_statistics(fingerprint, patience)
    except (OSError, ValueError) as error:  # about the model's other sessions
        logging.warning("HSWQ: %s", error)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _of_model(statistics: Statistics, order: Collection[str]) -> dict[str, LayerStatistics]:
    """Return the model's own layers: a node may have added others. Without `order`, return all."""
    if not order:
        return dict(statistics)
    return {name: statistics[name] for name in order if name in statistics}


def remove_statistics(fingerprint: str, session: str | None = None) -> int:
    """Remove what was recorded of a model, in one session or in all; return how many files.

    The caches that depend on it are removed too. Each file is removed under its lock; a process
    that waits to add to it then begins a new file. Lock files remain, because a process may be
    waiting for one: if it were removed, the next process would make a second lock. If one file
    cannot be removed, the others still are. The caller tells of the change.

    Raises:
        OSError: a file cannot be removed, or another process holds its lock.
    """
    removed, failed = 0, []
    later.wait_for(fingerprint)
    waiting.forget(fingerprint, session)
    for path in statistics_files(fingerprint):
        if session is None or path.name.endswith(f".{session}.pt"):
            try:
                removed += locked_file.remove(path, sketch_file.beside(path))
            except OSError as error:
                failed.append(error)
    refined.forget(fingerprint)
    heads.forget(fingerprint)
    milestones.forget(fingerprint)
    if failed:
        raise failed[0]
    return removed
