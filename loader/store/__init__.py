"""Recorded statistics on disk: locks, merging, and the cache of what searches found.

May import host, files, calibration and quant.
"""

from .readiness import (
    CALLS,
    IMAGES,
    LAYERS,
    NOISE,
    USABLE_CALLS,
    USABLE_LEVELS,
    USABLE_SAMPLES,
    fewest_calls,
    is_complete,
    is_usable,
    milestone,
    missing,
    missing_layers,
    target,
)
from .statistics import (
    PASSIVE_SESSION,
    add_statistics,
    check_session,
    quantizing_statistics,
    remove_statistics,
    replace_merged,
    state,
    statistics_files,
    statistics_of,
    statistics_path,
)
from .totals import MERGED, RECORDING, once_each, recordings, total_of

__all__ = [
    "CALLS",
    "IMAGES",
    "LAYERS",
    "MERGED",
    "NOISE",
    "PASSIVE_SESSION",
    "RECORDING",
    "USABLE_CALLS",
    "USABLE_LEVELS",
    "USABLE_SAMPLES",
    "add_statistics",
    "check_session",
    "fewest_calls",
    "is_complete",
    "is_usable",
    "milestone",
    "missing",
    "missing_layers",
    "once_each",
    "quantizing_statistics",
    "recordings",
    "remove_statistics",
    "replace_merged",
    "state",
    "statistics_files",
    "statistics_of",
    "statistics_path",
    "target",
    "total_of",
]
