"""The model files in ComfyUI's folders: which has which weights, and of which shapes."""

from __future__ import annotations

import functools
import math
import os
from typing import NamedTuple

import folder_paths

from .modelfile import (
    ModelFileError,
    diffusion_model_prefix,
    fingerprint,
    load_tensors,
    read_header,
)

FOLDERS = ("checkpoints", "diffusion_models")
_MAPPED = (".safetensors", ".sft")


def sources() -> list[str]:
    """Return the files of both folders, each with its folder's name before it."""
    return [
        f"{folder}/{name}" for folder in FOLDERS for name in folder_paths.get_filename_list(folder)
    ]


def source_path(source: str) -> str:
    """Return the path of one of `sources`; a node's link may bring anything.

    Raises:
        ValueError: it is none.
        FileNotFoundError: it is gone.
    """
    folder, _, name = source.partition("/") if isinstance(source, str) else ("", "", "")
    if folder not in FOLDERS or name not in folder_paths.get_filename_list(folder):
        raise ValueError(f"there is no model file {source!r} in ComfyUI's folders")
    return folder_paths.get_full_path_or_raise(folder, name)


def find_source(its_fingerprint: str, name: str) -> str | None:
    """Return the source with a model's weights, whatever it is called now; None where it is gone.

    May read every model file a bit, so not for the event loop.

    Args:
        its_fingerprint: of the weights.
        name: that the file had, the first to look for.
    """
    for source in sorted(sources(), key=lambda one: os.path.basename(one) != name):
        # Of a .ckpt all must be read: only where its name says so.
        if source.lower().endswith(_MAPPED) or os.path.basename(source) == name:
            try:
                found = _fingerprint(source_path(source))
            except (OSError, ValueError):  # deleted in between
                continue
            if found == its_fingerprint:
                return source
    return None


_known: dict[str, tuple[tuple, str | None]] = {}


def _fingerprint(path: str) -> str | None:
    """Return a file's fingerprint, None of a damaged one; each version of it is read once."""
    version = _version(path)
    known = _known.get(path)
    if known is None or known[0] != version:
        try:
            known = version, fingerprint(path)
        except ModelFileError:
            known = version, None
        _known[path] = known
    return known[1]


class Shapes(NamedTuple):
    """What a file's diffusion model is made of.

    Attributes:
        layers: shape of the weight of every Linear and Conv2d, by layer name.
        parameters: number of all its parameters.
    """

    layers: dict[str, tuple[int, ...]]
    parameters: int


def shapes_of(source: str) -> Shapes:
    """Return the shapes in a file; its weights are not read.

    Raises:
        OSError, ValueError: the file is gone or damaged.
    """
    path = source_path(source)
    return _shapes(path, _version(path))


@functools.lru_cache(maxsize=16)
def _shapes(path: str, _: tuple) -> Shapes:
    entries = read_header(path) if path.lower().endswith(_MAPPED) else load_tensors(path)[0]
    prefix = diffusion_model_prefix(entries)
    own = {
        name.removeprefix(prefix): tuple(entry.shape)
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in own.items()
        if name.endswith(".weight") and len(shape) in (2, 4)
    }
    return Shapes(layers, sum(map(math.prod, own.values())))


def _version(path: str) -> tuple:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
