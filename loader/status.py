"""What recording does, model by model: for the log now, and for whoever asks."""

from __future__ import annotations

import dataclasses
import datetime
import logging

RECORDING, COMPLETE, NOT_RECORDED, FAILED = "recording", "complete", "not recorded", "failed"


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
        if status.reason is None or (before is not None and before.reason == status.reason):
            return
        level = logging.WARNING if status.state == FAILED else logging.INFO
        logging.log(level, "HSWQ: %s is not recorded: %s", status.name, status.reason)

    def all(self) -> list[ModelStatus]:
        """Return the status of every model, the last one sampled with last."""
        return list(self._models.values())
