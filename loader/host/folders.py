"""The folder under `models/` in which statistics and caches are kept."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

FOLDER = "hswq"


def register_folder() -> None:
    """Register the statistics folder with ComfyUI. It is created when first written to."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, extensions | {".pt"})


def statistics_folder() -> Path:
    """Return the folder that statistics are written to."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0])
