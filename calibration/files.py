"""The statistics file: the `.pt` format "hswq_dual_monitor_v2" of the ComfyUI quantizer.

One key a layer is added to it, `input_amax`, which other tools ignore.
"""

from __future__ import annotations

import datetime
import io
import os
import pickle
import sys
from collections.abc import Mapping

import torch

from .archive import checked_archive
from .atomic import atomic_file
from .statistics import LayerStatistics, Statistics

FILE_TYPE = "hswq_dual_monitor_v2"
MAX_LAYERS = 1 << 12
"""SDXL has 794 layers. A file with this many passes all bounds of archive.py."""

MAX_CHANNELS = 1 << 20
MAX_ALL_CHANNELS = 1 << 24
"""All layers' channels together, which is 128 MiB. SDXL has 2**20."""
MAX_CALLS = 1 << 53
MAX_BATCH = 1 << 12
"""Latent images in one call: the most that ComfyUI's nodes allow."""

MAX_MAGNITUDE = torch.finfo(torch.float32).max
"""Largest activation: networks compute in FP32 at most. With it no sum of files overflows."""

MAX_NAME = 1000
_MAX_REASON = 200


class StatisticsError(ValueError):
    """A statistics file is damaged or of another kind; the message names it and says why."""


def save_statistics(statistics: Statistics, path: str | os.PathLike) -> None:
    """Write a statistics file. After a crash at any time it is either the old or the new one.

    Raises:
        OSError: the file cannot be written; an older one is unchanged.
        ValueError: load_statistics would refuse it, as when a sum is not finite; an older one is
            unchanged.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    meta = {"created_at": now, "total_steps": 0, **statistics.meta, "type": FILE_TYPE}
    layers = {name: _layer_table(layer) for name, layer in statistics.items()}
    _check_plain(meta)
    _parse({"meta": meta, "layers": layers})
    content = io.BytesIO()  # torch.save to a full disk would hide the reason in its own error
    torch.save({"meta": meta, "layers": layers}, content)
    with atomic_file(path) as file:
        file.write(content.getbuffer())


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Read a statistics file without running any code from it.

    Raises:
        OSError: it cannot be read; FileNotFoundError: it does not exist.
        StatisticsError: it is damaged, malicious or of another kind.
    """
    name = os.path.basename(path)
    try:
        data = torch.load(checked_archive(path), map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files raise errors of every kind
        reason = str(error).split("\n", 1)[0][:_MAX_REASON]
        if isinstance(error, pickle.UnpicklingError):  # torch's message advises to run its code
            reason = "it holds more than tensors and plain values"
        raise StatisticsError(f"{name} cannot be read as a statistics file: {reason}") from error
    try:
        return _parse(data)
    except ValueError as error:
        reason = str(error)[:_MAX_REASON]  # it may quote long text from the file
        raise StatisticsError(f"{name} is not an HSWQ statistics file: {reason}") from error


def _layer_table(layer: LayerStatistics) -> dict:
    # Copied, because torch.save writes the whole storage of a view.
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
    found = Statistics(called, _parse_meta(meta))
    most = MAX_BATCH * sum(layer.output_calls for layer in called.values())
    if called and found.samples > most:
        raise ValueError(f"it says {found.samples} samples, but its calls allow {most} at most")
    return found


def _channels(table: object) -> int:
    importance = table.get("input_imp_sum") if isinstance(table, Mapping) else None
    return importance.numel() if isinstance(importance, torch.Tensor) else 0


def _parse_meta(meta: Mapping) -> dict:
    """Return the plain values of a file's meta: other tools may have added anything to it."""
    plain = {
        key: value
        for key, value in meta.items()
        if isinstance(key, str) and key != "type" and isinstance(value, (str, int, float, bool))
    }
    layers = plain.get("layers")
    if type(layers) is int and not 0 <= layers <= MAX_LAYERS:
        raise ValueError(f"it says that its model has {layers} layers")
    counts = {key: _count(key, plain[key]) for key in ("samples", "total_steps") if key in plain}
    if not isinstance(plain.get("fingerprint", ""), str):
        raise ValueError(f"its fingerprint is {plain['fingerprint']!r}")
    return {**plain, **counts}


def _parse_layer(name: str, layer: object) -> LayerStatistics | None:
    """Return a layer's sums; None for a layer that was never called."""
    if not isinstance(layer, Mapping):
        raise ValueError(f"layer {name!r} is not a table")
    for key in ("output_sum", "output_sq_sum", "out_count", "input_imp_sum", "in_count"):
        if key not in layer:
            raise ValueError(f"layer {name!r} lacks {key}")
    output_calls = _count(f"out_count of layer {name!r}", layer["out_count"])
    input_calls = _count(f"in_count of layer {name!r}", layer["in_count"])
    if not output_calls or not input_calls:
        return None
    found = LayerStatistics(
        _float(f"output_sum of layer {name!r}", layer["output_sum"]),
        _float(f"output_sq_sum of layer {name!r}", layer["output_sq_sum"]),
        output_calls,
        _importance(name, layer["input_imp_sum"]),
        input_calls,
        _amax(f"input_amax of layer {name!r}", layer.get("input_amax")),
    )
    if not _possible(found):
        raise ValueError(f"the sums of layer {name!r} are impossible for its number of calls")
    return found


def _possible(layer: LayerStatistics) -> bool:
    """Whether a layer's number of calls, computed in FP32, can have its sums."""
    return (
        abs(layer.output_sum) <= layer.output_calls * MAX_MAGNITUDE
        and 0 <= layer.output_square_sum <= layer.output_calls * MAX_MAGNITUDE**2
        and layer.importance_sum.max().item() <= layer.input_calls * MAX_MAGNITUDE
        and (layer.input_amax or 0.0) <= MAX_MAGNITUDE
    )


def _importance(name: str, value: object) -> torch.Tensor:
    plain = (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and (value.device.type == "cpu" and value.is_floating_point() and not value.is_quantized)
    )
    # With a stride of 0, a few bytes in the file could claim a vector of any length.
    expanded = plain and 0 in value.stride() and value.numel() > 1
    if not plain or expanded or value.ndim != 1 or not 1 <= value.numel() <= MAX_CHANNELS:
        raise ValueError(f"input_imp_sum of layer {name!r} is not a vector of floats")
    importance = value.detach().to(torch.float64, copy=True)
    if not importance.isfinite().all() or (importance < 0).any():
        raise ValueError(f"input_imp_sum of layer {name!r} is negative or not finite")
    return importance


def _name(name: object) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise ValueError(f"a layer's name is not a string of 1 to {MAX_NAME} characters")
    return name


def _float(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is not a number")
    if not abs(value) <= sys.float_info.max:  # refuses nan, and integers beyond float
        raise ValueError(f"{what} is not a finite number")
    return float(value)


def _amax(what: str, value: object) -> float | None:
    """Return the largest |X| of a layer; None if its file does not say."""
    if value is not None and _float(what, value) < 0:
        raise ValueError(f"{what} is negative")
    return None if value is None else float(value)


def _count(what: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_CALLS:
        raise ValueError(f"{what} is not a count")
    return value
