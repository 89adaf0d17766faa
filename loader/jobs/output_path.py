"""Where an export may be written: below ComfyUI's output folder, with a harmless name."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import folder_paths

from ...calibration import sweep
from ..files.names import is_safe

SUFFIX = ".safetensors"
_MAX_NAME = 200  # characters below a folder, which every system allows
_MAX_SHOWN = 100


class ExportError(ValueError):
    """A file cannot be written to its place; the message says why."""


def default_name(source: str, short: str) -> str:
    """Return the name of a source's export.

    Args:
        source: the source's file name.
        short: the format's short name.
    """
    stem = re.sub(r"[^\w.()+,@-]", "_", Path(source).stem)[:50].strip(".")
    return f"{stem if is_safe(stem) else 'model'}_hswq_{short}"


def export_path(filename: str, folder: str) -> Path:
    """Return the path of a file name, which may begin with subfolders.

    Args:
        filename: as the user wrote it, with or without `.safetensors`.
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
    """Check that a file can be written; create its folder and remove unfinished files there.

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
            f"{target.name} needs {size / 2**20:.0f} MiB of disk space, but only "
            f"{free / 2**20:.0f} MiB are free in {target.parent}"
        )


def taken(target: Path) -> ExportError:
    """Return the error that a file of this name exists and may not be replaced."""
    return ExportError(f"{target.name} is there already: choose another filename, or set overwrite")
