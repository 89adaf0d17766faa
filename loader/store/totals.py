"""Summing up a model's files, so that no recording counts twice."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from ...calibration import Statistics

RECORDING, MERGED = "recording", "merged"
"""In a file's meta: the id of what was recorded into it, and the ids that were merged into it."""


def total_of(found: Sequence[Statistics]) -> Statistics | None:
    """Return the sums of a model's files, each recording once; None of no files.

    The total's meta says of how many recordings it is, as a merged file's does.
    """
    counted = {id(statistics) for statistics in once_each(found)}
    parts = [statistics for statistics in found if id(statistics) in counted]
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
    """Return those to count, the largest first, so that no recording counts twice."""
    counted: set[str] = set()
    chosen = []
    for statistics in sorted(found, key=lambda one: -one.samples):
        its = recordings(statistics)
        if counted.isdisjoint(its):
            chosen.append(statistics)
            counted |= its
    return chosen
