"""The statistics file: the `.pt` of the ComfyUI quantizer "hswq_dual_monitor_v2" (HSWQ.md).

A layer has one key more, `input_amax`, where it was recorded; other tools do not look at it.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pickle
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from .archive import checked_archive
from .statistics import LayerStatistics, Statistics

FILE_TYPE = "hswq_dual_monitor_v2"
MAX_LAYERS = 1 << 12
"""SDXL has 794; by all bounds of an archive this many may be read."""

MAX_CHANNELS = 1 << 20
MAX_ALL_CHANNELS = 1 << 24
"""Of all layers together, 128 MiB; SDXL has 2**20."""
MAX_CALLS = 1 << 53
MAX_NAME = 1000


class StatisticsError(ValueError):
    """A statistics file is not what it should be; the message names it and what is wrong."""


def save_statistics(statistics: Statistics, path: str | os.PathLike) -> None:
    """Write a statistics file so that after a crash at any moment it is the old or the new one.

    Raises:
        OSError: the file cannot be written; an older one is left as it was.
        ValueError: load_statistics would refuse it, as where a sum is not finite; likewise.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    meta = {"created_at": now, "total_steps": 0, **statistics.meta, "type": FILE_TYPE}
    layers = {name: _layer_table(layer) for name, layer in statistics.items()}
    _check_plain(meta)
    _parse({"meta": meta, "layers": layers})
    content = io.BytesIO()  # written at once: of a full disk, torch.save reports something else
    torch.save({"meta": meta, "layers": layers}, content)
    with atomic_file(path) as file:
        file.write(content.getbuffer())


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Read a statistics file without running any code from it.

    Raises:
        OSError: it cannot be read; FileNotFoundError: there is none.
        StatisticsError: it is damaged, malicious or of another kind.
    """
    name = os.path.basename(path)
    try:
        data = torch.load(checked_archive(path), map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files raise errors of every kind
        reason = str(error).split("\n", 1)[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's advice is how to run its code
            reason = "it holds more than tensors and plain values"
        raise StatisticsError(f"{name} cannot be read as a statistics file: {reason}") from error
    try:
        return _parse(data)
    except ValueError as error:
        raise StatisticsError(f"{name} is no HSWQ statistics file: {error}") from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary binary file beside `path` that replaces it when the block succeeds.

    On any error the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    # Not of tempfile, whose files only their owner may read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _layer_table(layer: LayerStatistics) -> dict:
    # A copy of its own: torch.save writes all of the storage that a view shows a part of.
    importance = layer.importance_sum.detach().to("cpu", torch.float64)
    amax = {} if layer.input_amax is None else {"input_amax": float(layer.input_amax)}
    return {
        "output_sum": float(layer.output_sum),
        "output_sq_sum": float(layer.output_square_sum),
        "out_count": layer.output_calls,
        "input_imp_sum": importance.clone(memory_format=torch.contiguous_format),
        "in_count": layer.input_calls,
        **amax,
    }


def _check_plain(meta: Mapping) -> None:
    for key, value in meta.items():
        if type(key) is not str or type(value) not in (str, int, float, bool, type(None)):
            raise ValueError(f"meta {key!r} is a {type(value).__name__}, not a plain value")


def _parse(data: object) -> Statistics:
    if not isinstance(data, Mapping) or not isinstance(data.get("layers"), Mapping):
        raise ValueError("it has no layers")
    meta = data.get("meta")
    if not isinstance(meta, Mapping) or meta.get("type") != FILE_TYPE:
        raise ValueError(f"its type is not {FILE_TYPE!r}")
    tables = data["layers"]
    if len(tables) > MAX_LAYERS:
        raise ValueError(f"it has {len(tables)} layers, and none has more than {MAX_LAYERS}")
    if sum(map(_channels, tables.values())) > MAX_ALL_CHANNELS:
        raise ValueError(f"its layers have more than {MAX_ALL_CHANNELS} channels")
    layers = {_name(name): _parse_layer(name, table) for name, table in tables.items()}
    called = {name: layer for name, layer in layers.items() if layer is not None}
    return Statistics(called, _parse_meta(meta))


def _channels(table: object) -> int:
    importance = table.get("input_imp_sum") if isinstance(table, Mapping) else None
    return importance.numel() if isinstance(importance, torch.Tensor) else 0


def _parse_meta(meta: Mapping) -> dict:
    """Keep what is a plain value; other tools may have put anything there."""
    plain = {
        key: value
        for key, value in meta.items()
        if isinstance(key, str) and key != "type" and isinstance(value, (str, int, float, bool))
    }
    counts = {key: _count(key, plain[key]) for key in ("samples", "total_steps") if key in plain}
    if not isinstance(plain.get("fingerprint", ""), str):
        raise ValueError(f"its fingerprint is {plain['fingerprint']!r}")
    return {**plain, **counts}


def _parse_layer(name: str, layer: object) -> LayerStatistics | None:
    """Return a layer's sums, None for one that was never called."""
    if not isinstance(layer, Mapping):
        raise ValueError(f"layer {name!r} is no table")
    for key in ("output_sum", "output_sq_sum", "out_count", "input_imp_sum", "in_count"):
        if key not in layer:
            raise ValueError(f"layer {name!r} lacks {key}")
    output_calls = _count(f"out_count of layer {name!r}", layer["out_count"])
    input_calls = _count(f"in_count of layer {name!r}", layer["in_count"])
    if not output_calls or not input_calls:
        return None
    return LayerStatistics(
        _float(f"output_sum of layer {name!r}", layer["output_sum"]),
        _float(f"output_sq_sum of layer {name!r}", layer["output_sq_sum"]),
        output_calls,
        _importance(name, layer["input_imp_sum"]),
        input_calls,
        _amax(f"input_amax of layer {name!r}", layer.get("input_amax")),
    )


def _importance(name: str, value: object) -> torch.Tensor:
    plain = (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and (value.device.type == "cpu" and value.is_floating_point() and not value.is_quantized)
    )
    expanded = plain and 0 in value.stride() and value.numel() > 1
    if not plain or expanded or value.ndim != 1 or not 1 <= value.numel() <= MAX_CHANNELS:
        raise ValueError(f"input_imp_sum of layer {name!r} is no vector of floats")
    importance = value.detach().to(torch.float64, copy=True)
    if not importance.isfinite().all() or (importance < 0).any():
        raise ValueError(f"input_imp_sum of layer {name!r} is negative or not finite")
    return importance


def _name(name: object) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise ValueError(f"a layer's name is no string of 1 to {MAX_NAME} characters")
    return name


def _float(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is no number")
    if not abs(value) <= sys.float_info.max:  # nan and integers beyond float too
        raise ValueError(f"{what} is no finite number")
    return float(value)


def _amax(what: str, value: object) -> float | None:
    """Return the largest |X| of a layer, None where its file does not say."""
    if value is not None and _float(what, value) < 0:
        raise ValueError(f"{what} is negative")
    return None if value is None else float(value)


def _count(what: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_CALLS:
        raise ValueError(f"{what} is no count")
    return value
