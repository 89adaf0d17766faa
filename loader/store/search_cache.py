"""A cache of what searches found, beside the statistics, so that no layer is searched twice.

A file begins with the SHA-256 of the rest. If it is damaged, edited or has a number out of range,
it counts as missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
from pathlib import Path

from ...calibration import atomic_file
from ...calibration.regular import open_regular
from ...quant import Findings, Plan, QuantizeSettings
from ..host.events import changed
from ..host.folders import statistics_folder

_KEPT_FILES = 64
_VERSION = 4  # of the algorithm and the file
_MAX_BYTES = 16 << 20  # SDXL's has 0.2 MiB
_SHORT = 16  # hex digits of the fingerprint in a file's name


def findings_key(fingerprint: str, statistics: str, settings: QuantizeSettings) -> str:
    """Return a file name that changes with all that a search depends on. keep_ratio is not in it.

    Args:
        fingerprint: of the model's weights.
        statistics: a key that changes with the statistics.
        settings: number format and search.
    """
    search = dataclasses.asdict(settings.search)
    facts = [_VERSION, fingerprint, statistics, settings.number_format.name, search]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{fingerprint[:_SHORT]}.{digest[:32]}"


def find_findings(key: str) -> Findings | None:
    """Return what earlier searches found; None if there is no file.

    A file that cannot be read counts as missing, and is written again.
    """
    try:
        with open_regular(_path(key)) as file:
            content = file.read(min(_MAX_BYTES, os.fstat(file.fileno()).st_size))
        return _read(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        reason = "it is damaged"
    logging.warning("HSWQ: a kept plan cannot be read and is made again: %s", reason)
    return None


def _written(found: Findings) -> bytes:
    text = json.dumps(found.to_json(), allow_nan=False).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def _read(content: bytes) -> Findings:
    """Rebuild what `_written` has made.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError: the content
            is damaged.
    """
    digest, _, text = content.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("its checksum differs")
    found = Findings.from_json(json.loads(text))
    for layer in found.layers.values():
        sizes = (layer.amax, layer.relative_error, layer.input_amax, layer.output_error)
        spread = layer.sensitivity  # nan if the layer's statistics are not finite
        if not all(map(_in_range, sizes)) or not (_in_range(spread) or math.isnan(spread)):
            raise ValueError("a number is out of range")
    return found


def _in_range(number: float | None) -> bool:
    return number is None or 0 <= number <= sys.float_info.max


def keep_findings(key: str, plan: Plan, samples: int) -> None:
    """Write what a Plan has found, and remove the files that were not used for the longest time.

    A file that cannot be written raises nothing: the next load searches again.
    """
    path, before = _path(key), find_findings(key)
    found = Findings.of(plan, samples) if before is None else before.including(plan)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(_written(found))
        for old in sorted(path.parent.glob("*.json"), key=os.path.getmtime)[:-_KEPT_FILES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logging.warning("HSWQ: the plan is not kept for the next load: %s", error)
    changed()


def note_use(key: str) -> None:
    """Note that a file was used now, so that files which are not used are removed before it."""
    with contextlib.suppress(OSError):  # the file may be gone, or the folder read-only
        os.utime(_path(key))


def forget_findings(fingerprint: str) -> None:
    """Remove all that searches found about a model."""
    for path in _path("").parent.glob(f"{fingerprint[:_SHORT]}.*.json"):
        path.unlink(missing_ok=True)


def _path(key: str) -> Path:
    return statistics_folder() / "plans" / f"{key}.json"
