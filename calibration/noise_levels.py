"""How many forwards a recording has seen at each noise level.

A level is an eighth of the model's schedule; the noisiest is first. Statistics have the eight
counts in their meta, as one text. Statistics without them, as other tools write them, count as
having seen all levels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

LEVELS = 8
NOISE_LEVELS = "noise_levels"
"""Key of the meta. Its value is LEVELS numbers, separated by spaces."""

_TEXT = re.compile(rf"\d{{1,15}}( \d{{1,15}}){{{LEVELS - 1}}}")


def noise_levels(sigmas: Iterable[float], percent_to_sigma: Callable[[float], float]) -> str:
    """Return the counts of one sampling, as the text for the meta.

    Args:
        sigmas: noise levels at which the model is called.
        percent_to_sigma: the model's schedule: takes 0 (its beginning) to 1, returns a falling
            sigma.
    """
    limits = [float(percent_to_sigma(level / LEVELS)) for level in range(1, LEVELS)]
    counts = [0] * LEVELS
    for sigma in sigmas:
        counts[sum(sigma <= limit for limit in limits)] += 1
    return _text(counts)


def seen_levels(meta: Mapping) -> int:
    """Return how many levels were seen; all of them if the meta does not say."""
    counts = _counts(meta)
    return LEVELS if counts is None else sum(count > 0 for count in counts)


def merged_levels(parts: Sequence[Mapping]) -> dict[str, str]:
    """Return the entry for the meta of a sum; {} if the meta of one part has none."""
    counts = [_counts(meta) for meta in parts]
    if not counts or None in counts:
        return {}
    return {NOISE_LEVELS: _text(map(sum, zip(*counts, strict=True)))}


def _text(counts: Iterable[int]) -> str:
    return " ".join(map(str, counts))


def _counts(meta: Mapping) -> list[int] | None:
    value = meta.get(NOISE_LEVELS)
    known = isinstance(value, str) and _TEXT.fullmatch(value)
    return list(map(int, value.split())) if known else None
