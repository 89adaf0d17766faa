"""The state of the recording of each model, for the log and the panel."""

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
"""Reason for a model that samples in FP8 and so is not recorded any more."""


@dataclasses.dataclass(frozen=True)
class ModelStatus:
    """The state of a model's recording at its last sampling.

    Attributes:
        name: of its file, or of its class if the file is unknown.
        fingerprint: of its weights; None if its file is unknown.
        state: RECORDING, COMPLETE, NOT_RECORDED or FAILED.
        samples: number of latent images recorded of it, in all sessions.
        reason: why it is not recorded; None if it is.
        last_run: time of the sampling, in ISO 8601.
    """

    name: str
    fingerprint: str | None
    state: str
    samples: int = 0
    reason: str | None = None
    last_run: str | None = None


class StatusTable:
    """The status of each model that has sampled since ComfyUI started."""

    def __init__(self) -> None:
        """Start without models."""
        self._models: dict[str, ModelStatus] = {}

    def note(self, status: ModelStatus) -> None:
        """Take a model's new status, and log its reason unless it is the same as before."""
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
        """Remove a model's status."""
        self._models.pop(fingerprint, None)

    def all(self) -> list[ModelStatus]:
        """Return the status of every model, in the order of their last samplings."""
        return list(self._models.values())


_sampling: collections.Counter[str] = collections.Counter()
_sampling_lock = threading.Lock()


@contextmanager
def sampling(fingerprint: str | None) -> Iterator[None]:
    """Note, for the length of the block, that a model's sampling is being recorded.

    For a model without a file (None) nothing is noted.
    """
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
