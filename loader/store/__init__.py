"""Recorded statistics on disk: locks, merging, and the cache of what searches found.

May import host, files, calibration and quant.
"""

from .sketch_sets import Sketches
from .sketches import hold_sketches, replace_sketches, sketches_beside, sketches_of, write_held
from .statistics import (
    MERGED,
    PASSIVE_SESSION,
    RECORDING,
    SENT,
    USABLE_SAMPLES,
    add_statistics,
    check_session,
    is_complete,
    is_usable,
    missing_layers,
    once_each,
    recordings,
    remove_statistics,
    replace_merged,
    state,
    statistics_files,
    statistics_of,
    statistics_path,
    target,
    total_of,
)

__all__ = [
    "MERGED",
    "PASSIVE_SESSION",
    "RECORDING",
    "SENT",
    "USABLE_SAMPLES",
    "Sketches",
    "add_statistics",
    "check_session",
    "hold_sketches",
    "is_complete",
    "is_usable",
    "missing_layers",
    "once_each",
    "recordings",
    "remove_statistics",
    "replace_merged",
    "replace_sketches",
    "sketches_beside",
    "sketches_of",
    "state",
    "statistics_files",
    "statistics_of",
    "statistics_path",
    "target",
    "total_of",
    "write_held",
]
