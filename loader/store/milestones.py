"""A model's statistics as they were at its last milestone: everything quantizes it by them.

Recording changes the statistics with every picture. The same workflow should give the same picture
all the same, so that a model is quantized by a copy of its statistics, which is renewed only at a
milestone (32, 64, 128 images and the target; see readiness).

The copy lies beside the statistics files and is no session: nothing lists or counts it. It holds
the total of all sessions when the milestone was reached, or first used. It is replaced when the
total reaches another milestone, or when somebody removes a recording that is in it. A copy of the
sketches lies beside it; if there were none at that time, there are none until the next milestone.
Its sums are kept without importances too (see heads.py), so that the panel need not read all of it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ...calibration import Statistics, StatisticsError
from ...quant import is_finite
from ..files.versions import version_of
from ..host.folders import statistics_folder
from . import heads_file, locked_file, sketch_file
from .heads_file import Version
from .paths import SHORT
from .readiness import milestone
from .sketches import sketches_of
from .totals import origins, recordings


def at_milestone(fingerprint: str, total: Statistics, patience: float | None = None) -> Statistics:
    """Return the statistics to quantize a model by, and keep them if they are not kept yet.

    Before the first milestone it is the total itself.

    Args:
        fingerprint: of the model's weights.
        total: sums of all its sessions, as they are now.
        patience: see locked_file.locked.
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
    """Replace what is kept. The caller holds the lock.

    Sketches are written first. If the process is killed between the two files, the sketches do not
    fit the statistics: then nothing reads them, and the next use writes both again.
    """
    found = sketches_of(total.fingerprint)
    if found is None:
        sketch_file.beside(path).unlink(missing_ok=True)
    else:
        its = sketch_file.Origin(total.fingerprint, "", recordings(total), total.samples)
        sketch_file.write(path, found, its)
    locked_file.write(total, path)
    if all(map(is_finite, total.values())):  # else its importances must be looked at
        heads_file.write_files(_sums(path), {path.name: (version_of(path), total)})


_known: dict[Path, tuple[Version, Statistics]] = {}


def sums_of(fingerprint: str, total: Statistics) -> Statistics | None:
    """Return what kept_of does, but importances may have no channels: reading them takes long."""
    path = _path(fingerprint)
    try:
        version = version_of(path)
    except OSError:
        return kept_of(fingerprint, total)
    if path not in _known or _known[path][0] != version:
        found = heads_file.read_files(_sums(path)).get(path.name)
        if found is None or found[0] != version:
            return kept_of(fingerprint, total)
        _known[path] = found
    return _current(_known[path][1], fingerprint, total)


def kept_sketches(kept: Statistics) -> sketch_file.SketchFile | None:
    """Return the sketches that were kept with a milestone's statistics; None if there are none.

    The statistics may be without importances.
    """
    return sketch_file.open_beside(_path(kept.fingerprint), kept, recordings(kept), kept.samples)


def kept_of(fingerprint: str, total: Statistics) -> Statistics | None:
    """Return the statistics that are kept of the total's last milestone; None if none are."""
    try:
        kept = locked_file.read(_path(fingerprint))
    except FileNotFoundError:
        return None
    except (OSError, StatisticsError) as error:
        logging.warning("HSWQ: %s; it is made again", error)
        return None
    return _current(kept, fingerprint, total)


def _current(kept: Statistics, fingerprint: str, total: Statistics) -> Statistics | None:
    """Return what is kept, if it is of a model's total's last milestone."""
    same = kept.fingerprint == fingerprint and milestone(kept) == milestone(total)
    return kept if same and origins(kept) <= origins(total) else None


def forget(fingerprint: str) -> None:
    """Remove the statistics and sketches that are kept of a model's milestone.

    Raises:
        OSError: they cannot be removed, or another process holds the lock.
    """
    path = _path(fingerprint)
    both = path, sketch_file.beside(path)
    if any(one.exists() for one in both):
        with locked_file.locked(path):
            for one in both:
                one.unlink(missing_ok=True)
            _sums(path).unlink(missing_ok=True)


def _path(fingerprint: str) -> Path:
    return statistics_folder() / f"{fingerprint[:SHORT]}.milestone"


def _sums(path: Path) -> Path:
    return path.parent / "plans" / f"{path.name}.sums"
