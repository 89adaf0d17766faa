"""A cache of what searches found, beside the statistics, so that no layer is searched twice.

A file that is damaged, edited (see kept_json) or has a number out of range counts as missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
from pathlib import Path

from ...quant import Findings, Plan, QuantizeSettings, int8
from ..files import kept_json
from ..host.events import changed
from ..host.folders import statistics_folder
from .paths import SHORT

_LARGEST = 1e100  # BF16 ends at 3e38, and a variance is a square; sums of such squares are finite
_KEPT_FILES = 64
_VERSION = 5  # of the algorithm and the file
_SHARES = frozenset(range(1, int8.SHARES + 1))


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
    return f"{fingerprint[:SHORT]}.{digest[:32]}"


def find_findings(key: str) -> Findings | None:
    """Return what earlier searches found; None if there is no file.

    A file that cannot be read counts as missing, and is written again.
    """
    try:
        return _checked(Findings.from_json(kept_json.read(_path(key))))
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        reason = "it is damaged"
    logging.warning("HSWQ: a kept plan cannot be read and is made again: %s", reason)
    return None


def _checked(found: Findings) -> Findings:
    """Return findings if all their numbers are possible, else raise ValueError."""
    for layer in found.layers.values():
        sizes = (layer.amax, layer.relative_error, layer.input_amax, layer.output_error)
        spread = layer.sensitivity  # nan if the layer's statistics are not finite
        if not all(map(_in_range, sizes)) or not (_in_range(spread) or math.isnan(spread)):
            raise ValueError("a number is out of range")
        if layer.row_shares is not None and not set(layer.row_shares) <= _SHARES:
            raise ValueError("a share of a row's largest weight is out of range")
    return found


def _in_range(number: float | None) -> bool:
    return number is None or 0 <= number <= _LARGEST


def keep_findings(key: str, plan: Plan, samples: int) -> None:
    """Write what a Plan has found, and remove the files that were not used for the longest time.

    A file that cannot be written raises nothing: the next load searches again.
    """
    path, before = _path(key), find_findings(key)
    found = Findings.of(plan, samples) if before is None else before.including(plan)
    try:
        kept_json.write(path, found.to_json())
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
    for path in _path("").parent.glob(f"{fingerprint[:SHORT]}.*.json"):
        path.unlink(missing_ok=True)


def _path(key: str) -> Path:
    return statistics_folder() / "plans" / f"{key}.json"
