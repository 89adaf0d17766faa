"""Summing up a model's files, so that no recording counts twice."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from ...calibration import Statistics

RECORDING, MERGED = "recording", "merged"
"""In a file's meta: the id of what was recorded into it, and the ids that were merged into it."""

SENT = "sent"
"""In a file's meta: somebody uploaded it."""


def total_of(found: Sequence[Statistics]) -> Statistics | None:
    """Return the sums of a model's files, each recording once; None of no files.

    The total's meta says of how many recordings it is, as a merged file's does. What is said of
    the model itself is what nobody sent.
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
    """Return which recordings a file sums up: its own, and those that were merged into it."""
    own, merged = (statistics.meta.get(key) for key in (RECORDING, MERGED))
    return frozenset(f"{own or ''} {merged or ''}".split())


def origins(statistics: Statistics) -> frozenset[str]:
    """Return its recordings; of a file that names none, when it was begun."""
    return recordings(statistics) or frozenset([str(statistics.meta.get("created_at"))])


def once_each(found: Iterable[Statistics]) -> list[Statistics]:
    """Return those to count, so that no recording counts twice.

    What nobody sent comes first, whatever a file from elsewhere says; then the largest.
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
    """Whether somebody sent a file."""
    return bool(statistics.meta.get(SENT))
