"""Where an export may be written: below ComfyUI's output folder, under a harmless name."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import folder_paths

from ...calibration import sweep
from ..files.names import is_safe

SUFFIX = ".safetensors"
_MAX_NAME = 200  # characters, as many as every system takes below a folder
_MAX_SHOWN = 100


class ExportError(ValueError):
    """A file cannot be written where it should be; the message says why."""


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
    if not parts or not all(map(is_safe, parts)) or len(filename) > _MAX_NAME:
        raise ValueError(
            "the filename must be letters, digits, spaces and '_-.()+,@', with '/' between "
            f"subfolders, at most {_MAX_NAME} in all, and not a name that a system reserves, "
            f"got {str(filename)[:_MAX_SHOWN]!r}"
        )
    base = os.path.join(folder_paths.get_output_directory(), folder)
    path = os.path.join(base, *parts) + SUFFIX
    if not folder_paths.is_within_directory(base, path):
        raise ValueError(f"{filename!r} leads out of ComfyUI's output folder")
    return Path(path)


def check_target(target: Path, source: str, size: int, overwrite: bool) -> None:
    """Make the folder of a file that is about to be written, and remove what was left in it.

    Raises:
        ExportError: another file is there, the target is the source, or the disk is too small.
    """
    if target.exists() and os.path.samefile(target, source):
        raise ExportError(f"{target.name} is the source itself: choose another filename")
    if target.is_dir() or (target.exists() and not overwrite):
        raise taken(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise ExportError(
            f"{target.name} needs {size / 2**20:.0f} MiB of disk space, and "
            f"{free / 2**20:.0f} MiB are free in {target.parent}"
        )


def taken(target: Path) -> ExportError:
    """Return what is wrong with the name of a file that may not be replaced."""
    return ExportError(f"{target.name} is there already: choose another filename, or set overwrite")
