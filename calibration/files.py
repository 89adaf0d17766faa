"""The statistics file: the `.pt` of the ComfyUI quantizer "hswq_dual_monitor_v2" (HSWQ.md)."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from .statistics import LayerStatistics, Statistics

FILE_TYPE = "hswq_dual_monitor_v2"
MAX_FILE_BYTES = 256 << 20  # SDXL's is 8 MiB
MAX_CHANNELS = 1 << 20
MAX_CALLS = 1 << 53


class StatisticsError(ValueError):
    """A statistics file is not what it should be; the message names it and what is wrong."""


def save_statistics(statistics: Statistics, path: str | os.PathLike) -> None:
    """Write a statistics file so that after a crash at any moment it is the old or the new one.

    Raises:
        OSError: the file cannot be written; an older one is left as it was.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    meta = {"created_at": now, "total_steps": 0, **statistics.meta, "type": FILE_TYPE}
    layers = {
        name: {
            "output_sum": layer.output_sum,
            "output_sq_sum": layer.output_square_sum,
            "out_count": layer.output_calls,
            "input_imp_sum": layer.importance_sum.to("cpu", torch.float64).contiguous(),
            "in_count": layer.input_calls,
        }
        for name, layer in statistics.items()
    }
    with atomic_file(path) as file:
        torch.save({"meta": meta, "layers": layers}, file)


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Read a statistics file without running any code from it.

    Raises:
        FileNotFoundError: there is none.
        StatisticsError: it is damaged, malicious or of another kind.
    """
    name = os.path.basename(path)
    size = os.path.getsize(path)
    if size > MAX_FILE_BYTES:
        raise StatisticsError(f"{name} is no statistics file: {size} bytes is too large for one")
    try:
        _check_archive(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises of every kind on damaged files
        reason = str(error).split("\n", 1)[0]
        raise StatisticsError(f"{name} cannot be read as a statistics file: {reason}") from error
    try:
        return _parse(data)
    except (ValueError, OverflowError) as error:
        raise StatisticsError(f"{name} is no HSWQ statistics file: {error}") from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike):
    """Open a temporary binary file beside `path` that replaces it when the block succeeds.

    On any error the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _check_archive(path: str | os.PathLike) -> None:
    """Refuse what torch.save never writes: no zip archive, or one that unpacks to too much."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive that torch.save writes")
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_FILE_BYTES:
        raise ValueError(f"it unpacks to {unpacked} bytes, too large for one")


def _parse(data: object) -> Statistics:
    if not isinstance(data, Mapping) or not isinstance(data.get("layers"), Mapping):
        raise ValueError("it has no layers")
    meta = data.get("meta")
    if not isinstance(meta, Mapping) or meta.get("type") != FILE_TYPE:
        raise ValueError(f"its type is not {FILE_TYPE!r}")
    layers = {_name(name): _parse_layer(name, layer) for name, layer in data["layers"].items()}
    called = {name: layer for name, layer in layers.items() if layer is not None}
    return Statistics(called, _parse_meta(meta))


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
    )


def _importance(name: str, value: object) -> torch.Tensor:
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and (
        value.device.type == "cpu" and value.is_floating_point() and not value.is_quantized
    )
    if not plain or value.ndim != 1 or not 1 <= value.numel() <= MAX_CHANNELS:
        raise ValueError(f"input_imp_sum of layer {name!r} is no vector of floats")
    importance = value.detach().to(torch.float64, copy=True)
    if not importance.isfinite().all() or (importance < 0).any():
        raise ValueError(f"input_imp_sum of layer {name!r} is negative or not finite")
    return importance


def _name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is no layer name")
    return name


def _float(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{what} is not finite")
    return float(value)


def _count(what: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_CALLS:
        raise ValueError(f"{what} is no count")
    return value
