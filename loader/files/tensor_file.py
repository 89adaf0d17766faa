"""Writing a safetensors file tensor by tensor, in any order: its header is known before."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from .errors import ModelFileError
from .safetensors import DTYPE_NAMES, MAX_HEADER_BYTES, TensorEntry


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """Where everything lies in a file.

    Attributes:
        header: the file's first bytes.
        entries: where each tensor lies; offsets are absolute in the file.
        size: of the file.
    """

    header: bytes
    entries: Mapping[str, TensorEntry]
    size: int

    def begin(self, file: BinaryIO) -> None:
        """Write the header."""
        file.write(self.header)

    def write(self, file: BinaryIO, name: str, tensor: torch.Tensor) -> int:
        """Write one tensor to its place; return its number of bytes.

        Raises:
            ValueError: its dtype or shape is not what the header says.
        """
        entry = self.entries[name]
        if (DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {entry}")
        file.seek(entry.start)
        file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return entry.end - entry.start

    def is_at(self, path: Path) -> bool:
        """Whether a file of this size and header is there."""
        try:
            with open(path, "rb") as file:
                same_header = file.read(len(self.header)) == self.header
            return same_header and path.stat().st_size == self.size
        except OSError:
            return False


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> TensorFile:
    """Give every tensor its place.

    Args:
        tensors: dtype and shape by name.
        metadata: the file's `__metadata__`.

    Raises:
        ModelFileError: a dtype is none of safetensors', or the header is too long for it.
    """
    # Wide items first, as the library does, so that every tensor is aligned to its items.
    names = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    table, end = {"__metadata__": dict(metadata)}, 0
    for name in names:
        dtype, shape = tensors[name]
        if dtype not in DTYPE_NAMES:
            raise ModelFileError(f"{name} is {dtype}, which safetensors cannot hold")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ModelFileError(f"the header would have {len(text)} bytes, which nothing reads")
    base = 8 + len(text)
    entries = {
        name: TensorEntry(
            table[name]["dtype"], tuple(tensors[name][1]),
            *(base + offset for offset in table[name]["data_offsets"]),
        )
        for name in names
    }  # fmt: skip
    return TensorFile(struct.pack("<Q", len(text)) + text, entries, base + end)
