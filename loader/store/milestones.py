"""A model's statistics as they were at its last milestone, by which everything quantizes it.

The file lies beside the recorded ones and is no session: nothing lists it or counts it. It is
written when a milestone is reached, or first used, and holds the total of all sessions then. It
stands until the total reaches another milestone, or lacks a recording that it holds. The sketches
of that moment lie beside it. Without any then, there are none until the next milestone.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ...calibration import Statistics, StatisticsError
from ..host.folders import statistics_folder
from . import locked_file, sketch_file
from .paths import SHORT
from .readiness import milestone
from .sketches import sketches_of
from .totals import origins, recordings


def at_milestone(fingerprint: str, total: Statistics, patience: float | None = None) -> Statistics:
    """Return what a model is quantized by, kept from now on; the total itself while not usable.

    Args:
        fingerprint: of the model's weights.
        total: of all its sessions, as they are now.
        patience: as of locked_file.locked.
    """
    if not milestone(total):
        return total
    path = _path(fingerprint)
    try:
        kept = kept_of(fingerprint, total)
        if kept is None:
            with locked_file.locked(path, patience):
                kept = kept_of(fingerprint, total)  # another process may have been quicker
                if kept is None:
                    _write(path, total)
    except OSError as error:
        logging.warning("HSWQ: what the model is quantized by is not kept: %s", error)
        return total
    return total if kept is None else kept


def _write(path: Path, total: Statistics) -> None:
    """Replace what is kept; its lock is held.

    Sketches come first. Who is killed after them leaves a milestone whose sketches are of another,
    which nothing reads; and the next use makes both again.
    """
    found = sketches_of(total.fingerprint)
    if found is None:
        sketch_file.beside(path).unlink(missing_ok=True)
    else:
        its = sketch_file.Origin(total.fingerprint, "", recordings(total), total.samples)
        sketch_file.write(path, found, its)
    locked_file.write(total, path)


def kept_sketches(kept: Statistics) -> sketch_file.SketchFile | None:
    """Return the sketches that were kept with a milestone; None where there were none."""
    return sketch_file.open_beside(_path(kept.fingerprint), kept, recordings(kept), kept.samples)


def kept_of(fingerprint: str, total: Statistics) -> Statistics | None:
    """Return what is kept of the total's last milestone; None where nothing is."""
    try:
        kept = locked_file.read(_path(fingerprint))
    except FileNotFoundError:
        return None
    except (OSError, StatisticsError) as error:
        logging.warning("HSWQ: %s; it is made again", error)
        return None
    same = kept.fingerprint == fingerprint and milestone(kept) == milestone(total)
    return kept if same and origins(kept) <= origins(total) else None


def forget(fingerprint: str) -> None:
    """Remove what is kept of a model.

    Raises:
        OSError: it cannot be removed, or another process keeps its lock.
    """
    path = _path(fingerprint)
    both = path, sketch_file.beside(path)
    if any(one.exists() for one in both):
        with locked_file.locked(path):
            for one in both:
                one.unlink(missing_ok=True)


def _path(fingerprint: str) -> Path:
    return statistics_folder() / f"{fingerprint[:SHORT]}.milestone"
