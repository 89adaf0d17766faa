"""Removing temporary files of killed processes from the folders that this extension writes to."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...calibration import sweep
from ..host.folders import statistics_folder
from ..store.refined import refined_folder
from .model_files import FOLDERS


def sweep_folders() -> None:
    """Remove unfinished statistics, caches and exports, unless their process still runs."""
    removed = sum(map(sweep, _folders()))
    if removed:
        logging.info("HSWQ: removed %d unfinished files of processes that were killed", removed)


def _folders() -> Iterator[Path]:
    yield statistics_folder()
    yield statistics_folder() / "plans"
    yield statistics_folder() / "effects"
    yield refined_folder()
    for name in FOLDERS:
        for folder, _, _ in os.walk(os.path.join(folder_paths.get_output_directory(), name)):
            yield Path(folder)
