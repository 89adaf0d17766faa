"""The file of a quantized model: what is in it, and reading it layer by layer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ...quant import FP8_SCALED, NUMBER_FORMATS, NumberFormat
from ..files.mapped_file import MappedFile
from ..files.safetensors import DTYPE_NAMES

FORMAT = "hswq_refined_v1"
DATA, SCALE, SUMS = ".weight", ".weight_scale", "hswq_sums"
"""Suffixes of a layer's two tensors; name of the tensor of checksums, sorted by layer name."""

_FORMATS = {DTYPE_NAMES[one.dtype]: one for one in NUMBER_FORMATS.values()}


def facts_of(
    key: str, number_format: NumberFormat, sizes: Mapping[str, tuple[int, ...]]
) -> tuple[dict, dict[str, str]]:
    """Return dtype and shape of each tensor of a file, and its metadata.

    Args:
        key: under which the file is kept.
        number_format: of the weights.
        sizes: the weights' shapes by layer name.
    """
    tensors: dict[str, tuple] = {SUMS: (torch.int64, (len(sizes),))}
    for name, shape in sizes.items():
        tensors[name + DATA] = number_format.dtype, tuple(shape)
        tensors[name + SCALE] = torch.float32, number_format.scale_shape(shape)
    return tensors, {"format": FORMAT, "key": key}


def checksum(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the sum of a layer's 64-bit words, an int64 scalar that is equal on all devices.

    It finds damage by a disk, not forgery.

    Args:
        data: the quantized weight.
        scale: FP32 weight_scale, on the same device.
    """
    content = data.contiguous().view(-1).view(torch.uint8)
    if content.storage_offset() % 8:
        content = content.clone()
    whole = content.numel() // 8 * 8
    words, rest = content[:whole].view(torch.int64), content[whole:]
    found = words.sum() + scale.view(torch.int32).sum(dtype=torch.int64)
    return found + rest.sum(dtype=torch.int64) if len(rest) else found


class RefinedModel:
    """A quantized model's layers, each mapped from the file when it is asked for.

    Attributes:
        path: of the file.
        names: of its layers, sorted.
        is_open: whether it is still open.
        is_whole: whether no layer was found damaged so far.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Open a file.

        Raises:
            OSError: it cannot be read; FileNotFoundError: it does not exist.
            ValueError: it is damaged, or has another key.
        """
        self.path, self.is_whole = path, True
        self._file = MappedFile(path)
        entries = dict(self._file.entries)
        sums = entries.pop(SUMS, None)
        self.names = sorted(name.removesuffix(DATA) for name in entries if name.endswith(DATA))
        wanted: dict[str, tuple] = {}
        for name in self.names:
            dtype, shape = entries[name + DATA].dtype, entries[name + DATA].shape
            its_format = _FORMATS.get(dtype if shape else None, FP8_SCALED)
            wanted[name + DATA] = DTYPE_NAMES[its_format.dtype], shape
            wanted[name + SCALE] = "F32", its_format.scale_shape(shape)
        if {name: (entry.dtype, entry.shape) for name, entry in entries.items()} != wanted:
            raise ValueError("its tensors are not a quantized model's")
        if sums is None or (sums.dtype, sums.shape) != ("I64", (len(self.names),)):
            raise ValueError("it has no checksum for each layer")
        if self._file.metadata != {"format": FORMAT, "key": key}:
            raise ValueError(f"it is not a {FORMAT} file with the key in its name")
        self._sums = dict(zip(self.names, self._file.read(SUMS).tolist(), strict=True))

    def read(
        self, name: str, up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return a layer's quantized weight and FP32 weight_scale; None if missing or damaged.

        Args:
            name: of the layer.
            up: copies a tensor from the CPU to where it is wanted, or returns it as it is: mapped,
                and valid after `close`.
        """
        found = self.read_unchecked(name, up)
        if found is None:
            return None
        *parts, is_right = found
        if is_right:
            return tuple(parts)
        self.reject(name)
        return None

    def read_unchecked(
        self, name: str, up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return a layer as `read` does, and whether it is right, a bool scalar tensor.

        A GPU finds that out in little time, but to ask it makes the CPU wait for all copies so far.
        """
        expected = self._sums.get(name)
        if expected is None:
            return None
        data, scale = up(self._file.read(name + DATA)), up(self._file.read(name + SCALE))
        is_right = (checksum(data, scale) == expected) & ((scale > 0) & (scale < torch.inf)).all()
        return data, scale, is_right

    def reject(self, name: str) -> None:
        """Note that a layer is damaged, so that `close` removes the file."""
        if self.is_whole:
            logging.warning("HSWQ: %s is made again: %s is damaged", self.path.name, name)
        self.is_whole = False

    @property
    def is_open(self) -> bool:
        """Whether it is still open."""
        return self._file is not None

    def close(self) -> None:
        """Close the file, and remove it if it was found damaged."""
        self._file = None
        if not self.is_whole:
            with contextlib.suppress(OSError):  # on Windows, if tensors still map it
                self.path.unlink()
