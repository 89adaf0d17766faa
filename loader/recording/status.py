"""The state of the recording of each model, for the log and the panel."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..host.events import changed, progressed
from ..store.heads import ID_DIGITS

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
        self._forgotten: dict[str, int] = {}

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
        """Remove a model's status. A sampling of it that is running now will not be added."""
        self._forgotten[fingerprint] = self.forgotten(fingerprint) + 1
        self._models.pop(fingerprint, None)

    def forgotten(self, fingerprint: str) -> int:
        """Return how often a model was forgotten."""
        return self._forgotten.get(fingerprint, 0)

    def all(self) -> list[ModelStatus]:
        """Return the status of every model, in the order of their last samplings."""
        return list(self._models.values())


@dataclasses.dataclass
class Sampling:
    """A sampling that is being recorded.

    Attributes:
        fingerprint: of its model's weights.
        images: number of its latent images.
        step: number of steps that are done.
        steps: number of all its steps; 0 while it is not known.
    """

    fingerprint: str
    images: int
    step: int = 0
    steps: int = 0

    def to_json(self) -> dict:
        """Return what the panel shows of it."""
        id_ = self.fingerprint[:ID_DIGITS]
        return {"id": id_, "images": self.images, "step": self.step, "steps": self.steps}


_samplings: list[Sampling] = []
_lock = threading.Lock()


@contextmanager
def sampling(fingerprint: str | None, images: int = 0) -> Iterator[None]:
    """Note, for the length of the block, that a model's sampling is being recorded.

    For a model without a file (None) nothing is noted.
    """
    if fingerprint is None:
        yield
        return
    mine = Sampling(fingerprint, images)
    with _lock:
        _samplings.append(mine)
    changed()
    try:
        yield
    finally:
        with _lock:
            _samplings[:] = [one for one in _samplings if one is not mine]
        changed()


def is_sampling(fingerprint: str) -> bool:
    """Whether a sampling of a model is being recorded now."""
    return any(one.fingerprint == fingerprint for one in samplings())


def samplings() -> list[Sampling]:
    """Return all samplings that are being recorded now."""
    with _lock:
        return list(_samplings)


def note_step(step: int, steps: int) -> None:
    """Note the progress of the sampling that runs: ComfyUI runs one at a time."""
    for one in samplings():
        one.step, one.steps = step, steps
    progressed()
