"""What recording does, model by model: for the log, and for whoever asks or listens."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..host.events import changed

RECORDING, COMPLETE, NOT_RECORDED, FAILED = "recording", "complete", "not recorded", "failed"

QUANTIZED = "its weights are quantized"
"""Reason of a model that samples in FP8: it is past recording."""


@dataclasses.dataclass(frozen=True)
class ModelStatus:
    """What became of a model's last sampling.

    Attributes:
        name: of its file, or of its class where that is unknown.
        fingerprint: of its weights, None where its file is unknown.
        state: RECORDING, COMPLETE, NOT_RECORDED or FAILED.
        samples: recorded of it, in all sessions.
        reason: why it is not recorded, None where it is.
        last_run: when that was, in ISO 8601.
    """

    name: str
    fingerprint: str | None
    state: str
    samples: int = 0
    reason: str | None = None
    last_run: str | None = None


class StatusTable:
    """The last status of every model that was sampled with since ComfyUI started."""

    def __init__(self) -> None:
        """Start with none."""
        self._models: dict[str, ModelStatus] = {}

    def note(self, status: ModelStatus) -> None:
        """Take a model's new status; its reason is logged when it is a new one."""
        key = status.fingerprint or status.name
        before = self._models.pop(key, None)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._models[key] = dataclasses.replace(status, last_run=now)
        changed()
        if status.reason is None or (before is not None and before.reason == status.reason):
            return
        level = logging.WARNING if status.state == FAILED else logging.INFO
        logging.log(level, "HSWQ: %s is not recorded: %s", status.name, status.reason)

    def forget(self, fingerprint: str) -> None:
        """Know nothing of a model any more."""
        self._models.pop(fingerprint, None)

    def all(self) -> list[ModelStatus]:
        """Return the status of every model, the last one sampled with last."""
        return list(self._models.values())


_sampling: collections.Counter[str] = collections.Counter()
_sampling_lock = threading.Lock()


@contextmanager
def sampling(fingerprint: str | None) -> Iterator[None]:
    """Note that a model's sampling is being recorded; None is of no file."""
    _count(fingerprint, 1)
    try:
        yield
    finally:
        _count(fingerprint, -1)


def is_sampling(fingerprint: str) -> bool:
    """Whether a sampling of a model is being recorded now."""
    return _sampling[fingerprint] > 0


def _count(fingerprint: str | None, change: int) -> None:
    if fingerprint is not None:
        with _sampling_lock:
            _sampling[fingerprint] += change
        changed()
