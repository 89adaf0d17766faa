"""Reading the header of a safetensors file.

The safetensors library checks the header before Python's JSON parser reads it, because Python would
block all threads for long on a number of a million digits. Before that, the header's length and
number of tensors are bounded.
"""

from __future__ import annotations

import json
import os
import struct
from typing import BinaryIO, NamedTuple

import safetensors
import torch

from ...calibration.regular import open_regular
from .errors import ModelFileError

MAX_HEADER_BYTES = 16 << 20
"""SDXL's header has 0.4 MiB. The library reads 50 MiB a second."""

MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 64  # torch's limit
_INCOMPLETE = ("incomplete metadata", "MetadataIncompleteBuffer")
"""Parts of the library's message if the header is good but the file has the wrong length."""


_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


DTYPE_NAMES = {
    getattr(torch, name): code for code, name in _TORCH_NAMES.items() if hasattr(torch, name)
}
"""Names of torch's dtypes in safetensors. Older torch lacks some of them."""

DTYPES = {code: dtype for dtype, code in DTYPE_NAMES.items()}
"""The dtypes by these names."""


NARROW = frozenset((
    "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3",
    "F6_E3M2", "F4",
))  # fmt: skip
"""The dtypes of fewer than 16 bits."""


class TensorEntry(NamedTuple):
    """A tensor's dtype and shape, and where its bytes are in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def is_safetensors(path: str) -> bool:
    """Whether ComfyUI takes a file for safetensors, of which parts can be read alone."""
    return path.lower().endswith((".safetensors", ".sft"))


class Header(NamedTuple):
    """What a safetensors header says: where tensors are, and the file's `__metadata__`."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: str) -> dict[str, TensorEntry]:
    """Return the entries of `parse_header`."""
    return parse_header(path).entries


def parse_header(path: str) -> Header:
    """Read and check a safetensors header; offsets are absolute in the file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ModelFileError: the header or the file's size is not what safetensors prescribes.
    """
    name = os.path.basename(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        text = _bounded(file, size, name)
    _judge(path, name)
    try:
        table = json.loads(text)
        metadata = table.pop("__metadata__", None) or {}
        entries = _entries(table, 8 + len(text))
    except ValueError as error:
        raise ModelFileError(f"{name} has a damaged safetensors header: {error}") from None
    promised = max((entry.end for entry in entries.values()), default=8 + len(text))
    if promised > size:
        raise ModelFileError(
            f"{name} is truncated: by its header it has {promised} bytes, but it has {size}"
        )
    return Header(entries, metadata)


def _bounded(file: BinaryIO, size: int, name: str) -> bytes:
    """Return the header's text, if it is short enough to be parsed quickly."""
    lead = file.read(8)
    length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else size
    if length > size - 8:
        raise ModelFileError(f"{name} is not a safetensors file: it has no valid header")
    if length > MAX_HEADER_BYTES:
        raise ModelFileError(
            f"{name} has a header of {length} bytes, and none has more than {MAX_HEADER_BYTES}"
        )
    text = file.read(length)
    if text.count(b"{") > MAX_TENSORS:
        raise ModelFileError(f"{name} has a header of more than {MAX_TENSORS} tensors")
    return text


def _judge(path: str, name: str) -> None:
    """Refuse a header that the library refuses. A wrong file length is reported by the caller."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        reason = str(error)
        if not any(text in reason for text in _INCOMPLETE):
            reason = reason.removeprefix("Error while deserializing header: ")[:150]
            raise ModelFileError(f"{name} has a damaged safetensors header: {reason}") from None


def _entries(header: dict, base: int) -> dict[str, TensorEntry]:
    entries = {}
    for name, info in header.items():
        if len(info["shape"]) > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name[:100]!r} has {len(info['shape'])} dimensions")
        start, end = info["data_offsets"]
        entries[name] = TensorEntry(info["dtype"], tuple(info["shape"]), base + start, base + end)
    return entries
