"""The model files in ComfyUI's folders: which has which weights, and of which shapes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ..files.fingerprints import fingerprint, known
from ..files.model_file import ModelFile
from ..files.safetensors import is_safetensors
from ..files.versions import version_of
from .also_keep import ENDS, also_kept

FOLDERS = ("checkpoints", "diffusion_models")


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

    Where no file is known to have them it reads the others a bit: not for the event loop.

    Args:
        its_fingerprint: of the weights.
        name: that the file had, the first to look for.
    """
    unread = []
    for source in sorted(sources(), key=lambda one: os.path.basename(one) != name):
        found = _look(known, source)
        if found == its_fingerprint:
            return source
        # Of a .ckpt all must be read: only where its name says so.
        if found is None and (is_safetensors(source) or os.path.basename(source) == name):
            unread.append(source)
    return next((one for one in unread if _look(fingerprint, one) == its_fingerprint), None)


def _look(at: Callable[[str], str | None], source: str) -> str | None:
    try:
        return at(source_path(source))
    except (OSError, ValueError):  # deleted in between, or damaged
        return None


class Shapes(NamedTuple):
    """What a file's diffusion model is made of.

    Attributes:
        layers: shape of the weight of every Linear and Conv2d, by layer name.
        parameters: number of all its parameters.
        ends: names of the first and the last projection, where they are told from others.
    """

    layers: dict[str, tuple[int, ...]]
    parameters: int
    ends: frozenset[str] = frozenset()


def shapes_of(source: str) -> Shapes:
    """Return the shapes in a file; its weights are not read.

    Raises:
        OSError, ValueError: the file is gone or damaged.
    """
    path = source_path(source)
    return _shapes(path, version_of(Path(path)))


@functools.lru_cache(maxsize=16)
def _shapes(path: str, _: tuple) -> Shapes:
    file = ModelFile(path)
    own = {name: entry.shape for name, entry in file.own.items()}
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in own.items()
        if name.endswith(".weight") and len(shape) in (2, 4)
    }
    return Shapes(layers, sum(map(math.prod, own.values())), also_kept(ENDS, file))
