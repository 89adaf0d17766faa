"""Summing up a model's statistics files so that no recording counts twice."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from ...calibration import Statistics
from ..files import owners

RECORDING, MERGED = "recording", "merged"
"""Keys of a file's meta: the id of its own recording, and the ids of recordings merged into it."""

SENT = "sent"
"""Key of a file's meta that says that somebody uploaded it."""

OTHER_WEIGHTS = "is left out: it was recorded of other weights, which look alike in every sample"


def is_of(statistics: Statistics, fingerprint: str) -> bool:
    """Whether statistics belong to the weights of a fingerprint, as far as that is known."""
    stated = statistics.meta.get(owners.WHOLE)
    return statistics.fingerprint == fingerprint and owners.agrees(fingerprint, stated)


def total_of(found: Sequence[Statistics]) -> Statistics | None:
    """Return the sums of a model's files, with each recording once; None if there are no files.

    The total's meta names its recordings, as a merged file's does. Facts about the model come from
    this machine's own recordings before uploaded ones.
    """
    counted = {id(statistics) for statistics in once_each(found)}
    parts = [statistics for statistics in found if id(statistics) in counted]
    parts.sort(key=_is_theirs)
    if len(parts) < 2:
        return parts[0] if parts else None
    total = functools.reduce(Statistics.merge, parts)
    merged = " ".join(sorted(frozenset().union(*map(origins, parts))))
    return Statistics(total, {**total.meta, MERGED: merged})


def recordings(statistics: Statistics) -> frozenset[str]:
    """Return the ids of the recordings in a file: its own, and those merged into it."""
    own, merged = (statistics.meta.get(key) for key in (RECORDING, MERGED))
    return frozenset(f"{own or ''} {merged or ''}".split())


def origins(statistics: Statistics) -> frozenset[str]:
    """Return a file's recordings; for a file that names none, the time when it was created."""
    return recordings(statistics) or frozenset([str(statistics.meta.get("created_at"))])


def once_each(found: Iterable[Statistics]) -> list[Statistics]:
    """Return the files to count, so that no recording counts twice.

    This machine's own files come before uploaded ones, which may claim anything; then larger ones
    before smaller ones.
    """
    counted: set[str] = set()
    chosen = []
    for statistics in sorted(found, key=lambda one: (_is_theirs(one), -one.samples)):
        its = recordings(statistics)
        if counted.isdisjoint(its):
            chosen.append(statistics)
            counted |= its
    return chosen


def _is_theirs(statistics: Statistics) -> bool:
    """Whether a file was uploaded."""
    return bool(statistics.meta.get(SENT))
