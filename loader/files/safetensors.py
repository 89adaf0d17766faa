"""Reading the header of a safetensors file."""

from __future__ import annotations

import json
import math
import os
import struct
from typing import NamedTuple

import torch

from .errors import ModelFileError

MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library


_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


DTYPE_NAMES = {
    getattr(torch, name): code for code, name in _TORCH_NAMES.items() if hasattr(torch, name)
}
"""What safetensors calls the dtypes; an older torch lacks the last."""


ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F4": 4, "C64": 64,
}  # fmt: skip


class TensorEntry(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def is_safetensors(path: str) -> bool:
    """Whether ComfyUI takes a file for safetensors, of which it can be read what is needed."""
    return path.lower().endswith((".safetensors", ".sft"))


def read_header(path: str) -> dict[str, TensorEntry]:
    """Read and check a safetensors header; offsets are absolute in the file.

    Raises:
        ModelFileError: the header or the file's size is not what safetensors prescribes.
    """
    name = os.path.basename(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        lead = file.read(8)
        length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size):
            raise ModelFileError(f"{name} is no safetensors file: it has no valid header")
        try:
            header = json.loads(file.read(length))
            entries = _entries(header, 8 + length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelFileError(f"{name} has a damaged safetensors header: {error}") from None
    promised = max((entry.end for entry in entries.values()), default=8 + length)
    if promised > size:
        raise ModelFileError(
            f"{name} is truncated: its header promises {promised} bytes, it has {size}"
        )
    return entries


def _entries(header: dict, base: int) -> dict[str, TensorEntry]:
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        start, end = info["data_offsets"]
        shape = tuple(info["shape"])
        whole = all(type(number) is int and number >= 0 for number in (start, end, *shape))
        bits = ITEM_BITS.get(info["dtype"])
        if not whole or bits is None or math.prod(shape) * bits != (end - start) * 8:
            raise ValueError(f"tensor {name!r} has inconsistent dtype, shape or offsets")
        entries[name] = TensorEntry(info["dtype"], shape, base + start, base + end)
    return entries
