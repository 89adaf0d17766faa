"""Writing a safetensors file tensor by tensor, in any order: the header is made first."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from ...calibration.regular import open_regular
from .errors import ModelFileError
from .safetensors import DTYPE_NAMES, MAX_HEADER_BYTES, TensorEntry

DIGEST = "hswq.sha256"
"""Key of a file's metadata. Its value is the SHA-256, in hex, of all bytes after the header."""

NO_DIGEST = "0" * 64
"""Value of DIGEST until the digest is known."""

_CHUNK_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The layout of a safetensors file.

    Attributes:
        header: the file's first bytes.
        entries: dtype, shape and place of each tensor; offsets are absolute in the file.
        size: of the file in bytes.
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
            ValueError: its dtype or shape differs from the header's.
        """
        entry = self.entries[name]
        if (DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {entry}")
        file.seek(entry.start)
        file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return entry.end - entry.start

    def seal(self, file: BinaryIO, between: Callable[[], None]) -> None:
        """Write the digest of all tensors into the metadata, when all tensors are written.

        Args:
            file: the file that `begin` was given; it has a name.
            between: is called between pieces of the work, and may raise, such as an interrupt.
        """
        file.flush()
        with open(file.name, "rb") as written:
            written.seek(len(self.header))
            digest = _digest_of(written, between)
        file.seek(self._digest_at)
        file.write(digest)

    def is_at(self, path: Path, between: Callable[[], None]) -> bool:
        """Whether a file with this header exists, whose digest fits its bytes.

        Args:
            path: of the file.
            between: as for `seal`.

        Raises:
            ModelFileError: the header is there, but the digest does not fit: the file is damaged.
        """
        at = self._digest_at
        try:
            with open_regular(path) as file:
                header = file.read(len(self.header))
                found = header[at : at + len(NO_DIGEST)]
                ours = header[:at] + NO_DIGEST.encode() + header[at + len(NO_DIGEST) :]
                if ours != self.header or os.fstat(file.fileno()).st_size != self.size:
                    return False
                same = _digest_of(file, between) == found
        except OSError:
            return False
        if not same:
            reason = "is there already, but damaged: choose another filename, or set overwrite"
            raise ModelFileError(f"{path.name} {reason}")
        return True

    @property
    def _digest_at(self) -> int:
        key = f'"{DIGEST}":"'.encode()  # unique: inside of other values, quotes are escaped
        return self.header.index(key) + len(key)


def _digest_of(file: BinaryIO, between: Callable[[], None]) -> bytes:
    """Return the SHA-256 of the rest of a file, in hex."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        between()
    return digest.hexdigest().encode()


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> TensorFile:
    """Lay out a file with given tensors.

    Args:
        tensors: dtype and shape by name.
        metadata: the file's `__metadata__`.

    Raises:
        ModelFileError: safetensors lacks a dtype, or the header is too long.
    """
    # Wide dtypes first, as the library does, so that every tensor is aligned to its dtype.
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
        raise ModelFileError(f"the header would have {len(text)} bytes, which is too long to read")
    base = 8 + len(text)
    entries = {
        name: TensorEntry(
            table[name]["dtype"], tuple(tensors[name][1]),
            *(base + offset for offset in table[name]["data_offsets"]),
        )
        for name in names
    }  # fmt: skip
    return TensorFile(struct.pack("<Q", len(text)) + text, entries, base + end)
