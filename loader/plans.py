"""Plans that were made, kept beside the statistics so that the search runs once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path

from ..calibration import atomic_file
from ..quant import Plan
from .quantizer import QuantizeSettings
from .store import statistics_folder

_KEPT_PLANS = 64
_VERSION = 1  # of the algorithm and the file


def plan_key(fingerprint: str, statistics: str, settings: QuantizeSettings) -> str:
    """Return what a Plan depends on, as a file name.

    Args:
        fingerprint: of the model's weights.
        statistics: what tells these statistics from others.
        settings: mode, keep_ratio and search.
    """
    facts = [_VERSION, fingerprint, statistics, dataclasses.asdict(settings)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


def find_plan(key: str) -> tuple[Plan, int] | None:
    """Return a kept Plan and the samples that it was made from; None where there is none.

    One that cannot be read counts as none: it is made again.
    """
    try:
        data = json.loads(_path(key).read_text(encoding="utf-8"))
        return Plan.from_json(data["plan"]), int(data["samples"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.warning("HSWQ: a kept plan cannot be read and is made again: %s", error)
        return None


def keep_plan(key: str, plan: Plan, samples: int) -> None:
    """Keep a Plan for the next load, and forget the ones not used for longest.

    A plan that cannot be written is no reason to fail: the next load searches again.
    """
    path = _path(key)
    text = json.dumps({"plan": plan.to_json(), "samples": samples}, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text.encode())
        plans = sorted(path.parent.glob("*.json"), key=os.path.getmtime)
        for old in plans[:-_KEPT_PLANS]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logging.warning("HSWQ: the plan is not kept for the next load: %s", error)


def _path(key: str) -> Path:
    return statistics_folder() / "plans" / f"{key}.json"
