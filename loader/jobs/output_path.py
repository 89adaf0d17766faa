"""Where an export may be written: below ComfyUI's output folder, under a harmless name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ..files.names import is_safe

SUFFIX = ".safetensors"


def default_name(source: str, short: str) -> str:
    """Return the name of a source's export.

    Args:
        source: the source's file name.
        short: the format's short name.
    """
    stem = re.sub(r"[^\w.()+,@-]", "_", Path(source).stem)[:50].strip(".")
    return f"{stem if is_safe(stem) else 'model'}_hswq_{short}"


def export_path(filename: str, folder: str) -> Path:
    """Return the file that a name stands for, which may begin with subfolders.

    Args:
        filename: as the user has it, with or without `.safetensors`.
        folder: in the output folder: checkpoints or diffusion_models.

    Raises:
        ValueError: the name is not allowed, or leads out of the folder.
    """
    parts = filename.removesuffix(SUFFIX).split("/") if isinstance(filename, str) else []
    if not parts or not all(map(is_safe, parts)):
        raise ValueError(
            "the filename must be letters, digits, spaces and '_-.()+,@', with '/' between "
            f"subfolders, and no name that a system reserves, got {filename!r}"
        )
    base = os.path.join(folder_paths.get_output_directory(), folder)
    path = os.path.join(base, *parts) + SUFFIX
    if not folder_paths.is_within_directory(base, path):
        raise ValueError(f"{filename!r} leads out of ComfyUI's output folder")
    return Path(path)
