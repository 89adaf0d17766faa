"""The model files in ComfyUI's folders: which file has which weights, and their shapes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ..engine.model_structure import needed_beside
from ..files.fingerprints import known, looked_up
from ..files.model_file import ModelFile
from ..files.safetensors import is_safetensors
from ..files.versions import version_of
from .also_keep import ENDS, also_kept
from .outcome import Sizes

FOLDERS = ("checkpoints", "diffusion_models")


def sources() -> list[str]:
    """Return the files of both folders, as "folder/name"."""
    return [
        f"{folder}/{name}" for folder in FOLDERS for name in folder_paths.get_filename_list(folder)
    ]


def source_path(source: str) -> str:
    """Return the path of one of `sources`.

    Raises:
        ValueError: it is not one of them, as a node's link may bring anything.
        FileNotFoundError: the file is gone.
    """
    folder, _, name = source.partition("/") if isinstance(source, str) else ("", "", "")
    if folder not in FOLDERS or name not in folder_paths.get_filename_list(folder):
        raise ValueError(f"there is no model file {source!r} in ComfyUI's folders")
    return folder_paths.get_full_path_or_raise(folder, name)


def find_source(its_fingerprint: str, name: str) -> str | None:
    """Return the source that holds a model's weights, also if it was renamed; None if it is gone.

    If no file is known to hold them, it reads samples of files that it does not know yet. That
    may take long: do not call it in the event loop.

    Args:
        its_fingerprint: of the weights.
        name: file name that the model had; a file with that name is looked at first.
    """
    unread = []
    for source in sorted(sources(), key=lambda one: os.path.basename(one) != name):
        found = _look(known, source)
        if found == its_fingerprint:
            return source
        # A .ckpt must be read as a whole, so it is read only if its name fits.
        if found is None and (is_safetensors(source) or os.path.basename(source) == name):
            unread.append(source)
    return next((one for one in unread if _look(looked_up, one) == its_fingerprint), None)


def _look(at: Callable[[str], str | None], source: str) -> str | None:
    try:
        return at(source_path(source))
    except (OSError, ValueError):  # deleted in between, or damaged
        return None


class Shapes(NamedTuple):
    """The shapes of a file's diffusion model.

    Attributes:
        sizes: of its layers.
        ends: names of the projections from the latent and back to it, if they are identified.
        beside: bytes that a step takes beside the weights (see model_structure.needed_beside).
    """

    sizes: Sizes
    ends: frozenset[str] = frozenset()
    beside: float = 0.0

    @property
    def layers(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of the weight of every Linear and Conv2d, by layer name."""
        return self.sizes.layers


def shapes_of(source: str) -> Shapes:
    """Return the shapes in a file, without reading its weights.

    Raises:
        OSError, ValueError: the file is gone or damaged.
    """
    path = source_path(source)
    return _shapes(path, version_of(Path(path)))


@functools.lru_cache(maxsize=64)
def _shapes(path: str, _: tuple) -> Shapes:
    file = ModelFile(path)
    return Shapes(Sizes.of(file), also_kept(ENDS, file), needed_beside(file))
