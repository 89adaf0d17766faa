"""Recorded statistics and sketches on disk: locks and merging; caches of searches and models.

May import host, files, calibration and quant.
"""

from .heads import head_of
from .paths import check_session, statistics_files, statistics_path
from .readiness import (
    CALLS,
    IMAGES,
    LAYERS,
    NOISE,
    USABLE_CALLS,
    USABLE_LEVELS,
    USABLE_SAMPLES,
    is_complete,
    is_usable,
    milestone,
    missing,
    missing_layers,
    target,
)
from .sketch_sets import Sketches
from .sketches import sketches_beside, sketches_of, write_held
from .soon import add_soon
from .statistics import (
    PASSIVE_SESSION,
    add_statistics,
    quantizing_sketches,
    quantizing_statistics,
    remove_statistics,
    replace_merged,
    state,
    statistics_of,
)
from .totals import MERGED, RECORDING, SENT, once_each, recordings, total_of
from .waiting import NewSums

__all__ = [
    "CALLS",
    "IMAGES",
    "LAYERS",
    "MERGED",
    "NOISE",
    "PASSIVE_SESSION",
    "RECORDING",
    "SENT",
    "USABLE_CALLS",
    "USABLE_LEVELS",
    "USABLE_SAMPLES",
    "NewSums",
    "Sketches",
    "add_soon",
    "add_statistics",
    "check_session",
    "head_of",
    "is_complete",
    "is_usable",
    "milestone",
    "missing",
    "missing_layers",
    "once_each",
    "quantizing_sketches",
    "quantizing_statistics",
    "recordings",
    "remove_statistics",
    "replace_merged",
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
