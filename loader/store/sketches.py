"""A model's sketches: new ones are held in memory, and written after every few samplings.

SDXL's file has 112 MB, which is too much to write after each sampling. A process that is killed
loses the sketches of its last samplings, but never the sums in the statistics file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...calibration import Sketch, Statistics, StatisticsError, merge_sketches
from . import heads, locked_file, sketch_file
from .readiness import USABLE_SAMPLES, target
from .sketch_sets import Recorded, Sketches, Total
from .totals import RECORDING, once_each, recordings

BYTES_A_SAMPLING = 8 << 20
"""Bytes of sketches to write a sampling, on average: it takes 10 to 20 ms."""


@dataclasses.dataclass
class _Held:
    """Sketches of one statistics file that are not written yet.

    Attributes:
        origin: where they come from.
        sketches: by layer name.
        samplings: number of samplings since the last writing.
    """

    origin: sketch_file.Origin
    sketches: dict[str, Sketch]
    samplings: int = 0

    def is_due(self) -> bool:
        """Whether there were enough samplings since the last writing."""
        matrices = {id(sketch): sketch.matrix for sketch in self.sketches.values()}
        size = sum(matrix.numel() for matrix in matrices.values())
        return self.samplings * BYTES_A_SAMPLING >= size


_held: dict[Path, _Held] = {}
_lock = threading.Lock()  # the panel and samplings run in different threads


def hold_sketches(
    sketches: Mapping[str, Sketch], total: Statistics, path: Path, samples: int
) -> None:
    """Hold a sampling's sketches, and write all that are held if that is due.

    Args:
        sketches: by layer name.
        total: content of the statistics file, with the sampling's sums in it.
        path: of that file.
        samples: number of latent images in the sampling.
    """
    with _lock:
        held = _held.get(path)
        ids = frozenset({str(total.meta[RECORDING])})
        if held is None or held.origin.recordings != ids:  # the file was begun again
            held = _held[path] = _Held(_origin(total, ids), {})
        held.sketches = merge_sketches(held.sketches, sketches)
        held.samplings += 1
        due = held.is_due() or _milestone(total.samples - samples, total.samples)
    if due:
        write_held(path, locked_file.SHORTLY)


def _milestone(before: int, now: int) -> bool:
    """Whether a milestone lies between two numbers of latent images."""
    marks = {USABLE_SAMPLES, 2 * USABLE_SAMPLES, 4 * USABLE_SAMPLES, target(), 2 * target()}
    return any(before < mark <= now for mark in marks)


def write_held(path: Path | None = None, patience: float | None = None) -> None:
    """Write the sketches in memory that belong to a statistics file, or all of them.

    If a file is locked for longer than `patience` (see locked_file.locked), its sketches remain in
    memory.
    """
    for one in [path] if path else list(_held):
        with _lock:
            held = _held.pop(one, None)
        if held is None or not held.sketches:
            continue
        try:
            _add(held, one, patience)
        except (OSError, ValueError) as error:
            logging.warning("HSWQ: the sketches of %s are not written yet: %s", one.name, error)
            # With samplings 0, the next attempt waits as long as after a writing.
            with _lock:
                _held.setdefault(one, dataclasses.replace(held, samplings=0))


def _add(held: _Held, path: Path, patience: float | None) -> None:
    """Add sketches to their file. If its statistics were removed or replaced, they are dropped."""
    with locked_file.locked(path, patience):
        try:
            statistics = locked_file.read(path)
        except FileNotFoundError:
            return
        ids = recordings(statistics)
        if not held.origin.recordings <= ids:
            return
        new, before = Recorded(held.sketches), sketch_file.open_beside(path, statistics, ids)
        if before is None:
            sketch_file.write(path, new, held.origin)
        else:
            its = held.origin.recordings | before.recordings
            sketch_file.write(path, Total([before, new]), held.origin._replace(recordings=its))


def replace_sketches(path: Path, parts: Sequence[sketch_file.SketchFile]) -> None:
    """Write the sums of several files' sketches beside a statistics file that sums up those files.

    Args:
        path: of the statistics file.
        parts: the sketches of the files that it sums up.

    Raises:
        OSError: they cannot be written; the previous ones are unchanged.
        ValueError: a layer has different numbers of input channels in two of them.
    """
    with locked_file.locked(path):
        if not parts:
            sketch_file.beside(path).unlink(missing_ok=True)
            return
        ids = frozenset().union(*(part.recordings for part in parts))
        sketch_file.write(path, Total(parts), _origin(locked_file.read(path), ids))


def _origin(statistics: Statistics, ids: frozenset[str]) -> sketch_file.Origin:
    return sketch_file.Origin(statistics.fingerprint, str(statistics.meta.get("session", "")), ids)


def sketches_of(fingerprint: str) -> Sketches | None:
    """Return the sums of the sketches of all sessions of a model; None if there are none.

    As in `statistics_of`, each recording counts once.
    """
    head = heads.head_of(fingerprint)
    found = {} if head is None else {id(one.about): one.path for one in head.sessions}
    parts = []
    for about in once_each([] if head is None else [one.about for one in head.sessions]):
        path = found[id(about)]
        with contextlib.suppress(StatisticsError, FileNotFoundError):  # statistics_of reports it
            if path in _held or sketch_file.beside(path).exists():
                parts.append(sketches_beside(path, locked_file.read(path)))
    parts = [part for part in parts if part is not None]
    try:
        return Total(parts) if parts else None
    except ValueError as error:
        logging.warning("HSWQ: the sketches are not used: %s", error)
        return None


def sketches_beside(path: Path, statistics: Statistics) -> sketch_file.SketchFile | None:
    """Write a statistics file's sketches that are in memory; return all of it, None without."""
    write_held(path)
    return sketch_file.open_beside(path, statistics, recordings(statistics))
