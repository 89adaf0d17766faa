"""A cache of quantized models on disk: the next load reads half the bytes and rounds nothing.

A file holds the quantized layers of one model, as an export does. The other tensors are read from
the checkpoint. Damaged files count as missing. When the cache is full, the file that was not used
for the longest time is removed first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ...calibration import atomic_file
from ...quant import NumberFormat
from ..files.tensor_file import TensorFile, lay_out
from ..host import settings
from ..host.folders import statistics_folder
from .paths import SHORT
from .refined_file import DATA, SCALE, SUMS, RefinedModel, checksum, facts_of

_SUFFIX = ".safetensors"


def refined_folder() -> Path:
    """Return the folder of the cache's files."""
    return statistics_folder() / "refined"


def find(key: str) -> RefinedModel | None:
    """Open the file that was kept under a key; None if there is none or the user wants no cache.

    A file that is damaged or has another key is reported in the log, and counts as missing.

    Args:
        key: the first 16 digits of the model's fingerprint, a dot, and hex digits that change with
            everything that the bytes depend on.
    """
    if not _limit():
        return None
    path = _path(key)
    try:
        found = RefinedModel(path, key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        logging.warning("HSWQ: the refined model %s is made again: %s", path.name, reason)
        return None
    _open[id(found)] = found
    with contextlib.suppress(OSError):  # the folder may be read-only
        os.utime(path)
    return found


# Files in use, so that they are not removed to make room for another.
_open: weakref.WeakValueDictionary[int, RefinedModel] = weakref.WeakValueDictionary()


def keep(
    key: str,
    number_format: NumberFormat,
    layers: Iterable[tuple[str, torch.Tensor, torch.Tensor]],
    sizes: Mapping[str, tuple[int, ...]],
) -> None:
    """Write a quantized model's layers for the next load, one at a time, and wait for the disk.

    Files that were not used for the longest time make room for it. If it is larger than the user
    allows, or cannot be written, the log says so and nothing is kept.

    Args:
        key: see `find`.
        number_format: of the layers.
        layers: name, weight and FP32 weight_scale of every quantized layer, in any order and on any
            device.
        sizes: the weights' shapes by layer name.

    Raises:
        ValueError: the layers are not those of `sizes`; nothing is kept.
    """
    path, limit = _path(key), _limit()
    layout = lay_out(*facts_of(key, number_format, sizes))
    try:
        fits = layout.size <= limit
        if _make_room(limit - layout.size if fits else limit, path) and fits:
            _write(path, layout, layers, sizes)
        elif limit:
            logging.info(
                "HSWQ: a refined model of %.1f GiB is not kept: the setting allows %.1f GiB in all",
                layout.size / (1 << 30), limit / (1 << 30),
            )  # fmt: skip
    except OSError as error:
        logging.warning("HSWQ: the refined model is not kept: %s", error.strerror or error)


def forget(fingerprint: str) -> None:
    """Remove all files of a model. On Windows, a file that another process has open remains."""
    for path in refined_folder().glob(f"{fingerprint[:SHORT]}.*{_SUFFIX}"):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logging.warning("HSWQ: %s cannot be removed: %s", path.name, error.strerror)


def _write(
    path: Path,
    layout: TensorFile,
    layers: Iterable[tuple[str, torch.Tensor, torch.Tensor]],
    sizes: Mapping[str, tuple[int, ...]],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < layout.size:
        raise OSError(f"the disk has less than {layout.size / (1 << 30):.1f} GiB left")
    sums: dict[str, int] = {}
    with atomic_file(path) as file:
        layout.begin(file)
        for name, data, scale in layers:
            if name in sums or name not in sizes:
                raise ValueError(f"layer {name!r} comes twice, or is not one of the model's")
            sums[name] = checksum(data, scale).item()
            layout.write(file, name + DATA, data.cpu())
            layout.write(file, name + SCALE, scale.cpu())
        if len(sums) < len(sizes):
            raise ValueError(f"{len(sizes) - len(sums)} of the model's layers are missing")
        layout.write(file, SUMS, torch.tensor([sums[name] for name in sorted(sums)]))


def _make_room(size: int, but: Path) -> bool:
    """Remove the files that were used longest ago until the rest have at most `size` bytes.

    Files that are open remain. `but` does not count: it is about to be replaced.

    Returns:
        Whether the rest have at most `size` bytes.
    """
    in_use = {found.path for found in list(_open.values()) if found.is_open}
    files = [(when, count, path) for when, count, path in _files() if path != but]
    total = sum(count for _, count, _ in files)
    for _, count, path in sorted(files):
        if total <= size:
            break
        if path not in in_use:
            with contextlib.suppress(OSError):  # on Windows, if another process has it open
                path.unlink(missing_ok=True)
                total -= count
    return total <= size


def _files() -> Iterator[tuple[int, int, Path]]:
    """Yield each file's last use (ns), size in bytes and path."""
    for path in refined_folder().glob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            status = path.stat()
            yield status.st_mtime_ns, status.st_size, path


def _limit() -> int:
    """Return the bytes that the user allows for all files together; 0 turns the cache off."""
    return int(settings.current().refined_gb * (1 << 30))


def _path(key: str) -> Path:
    return refined_folder() / f"{key}{_SUFFIX}"
