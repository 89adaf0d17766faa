"""What is known of each model: its statistics files, its last sampling, its FP8 copy in memory."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from ...calibration import Statistics, seen_levels
from .. import store
from ..engine.alive import Alive, alive_models
from ..host import settings
from ..host.events import changed
from ..jobs.model_files import find_source, shapes_of
from ..jobs.outcome import Sizes, outcome_of_plan
from ..recording.status import (
    COMPLETE,
    FAILED,
    NOT_RECORDED,
    QUANTIZED,
    RECORDING,
    ModelStatus,
    is_sampling,
)
from ..store import heads
from ..store.effects import measured_in
from ..store.heads import ID_DIGITS, Head, Session

READY = "ready"
_MAX_TEXT = 200
_SECONDS = 1.0
"""How long a status may read files: each takes 0.05 s, and there may be many."""


@dataclasses.dataclass(frozen=True)
class Model:
    """All that is known of one model.

    Attributes:
        fingerprint: of its weights.
        files: its sessions, in the order of their files' names.
        statistics: sums of all sessions, without importances; None if there are none.
        noted: its last sampling since ComfyUI started; None if there was none.
        alive: its quantized copy in memory; None if there is none.
        name: of its file, which may be gone.
        source: its file as the nodes name it; None if the file is gone.
        problems: a sentence about each of its sessions that cannot be read.
    """

    fingerprint: str
    files: tuple[Session, ...]
    statistics: Statistics | None
    noted: ModelStatus | None
    alive: Alive | None
    name: str
    source: str | None
    problems: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        fingerprint: str,
        head: Head | None,
        noted: ModelStatus | None,
        alive: Alive | None,
        problems: tuple[str, ...] = (),
    ) -> Model:
        """Collect what is known, and look for the model's file."""
        statistics, files = (head.total, head.sessions) if head is not None else (None, ())
        name = noted.name if noted is not None else _text(statistics.meta.get("model"))
        source = find_source(fingerprint, name or "")
        name = os.path.basename(source) if source else name or fingerprint[:ID_DIGITS]
        return cls(fingerprint, files, statistics, noted, alive, name, source, problems)

    @property
    def id(self) -> str:
        """The first digits of its fingerprint."""
        return self.fingerprint[:ID_DIGITS]

    @property
    def last_run(self) -> str | None:
        """Time of its last sampling, in ISO 8601."""
        times = [_text(file.about.meta.get("last_run")) for file in self.files]
        times.append(self.noted and self.noted.last_run)
        return max(filter(None, times), default=None)

    @property
    def total_layers(self) -> int | None:
        """How many layers it has; None if its statistics do not say."""
        if self.statistics is None or "layers" not in self.statistics.meta:
            return None
        return len(self.statistics) + store.missing_layers(self.statistics)

    def state(self) -> tuple[str, str | None]:
        """Return the state of its recording, and the reason if it is not recorded or incomplete."""
        known, noted = self.statistics, self.noted
        problem = self.problems[0] if self.problems else None
        if known is not None and store.is_complete(known):
            return COMPLETE, problem
        usable = known is not None and store.is_usable(known)
        done = usable and noted is not None and noted.reason == QUANTIZED
        if noted is not None and noted.state in (NOT_RECORDED, FAILED) and not done:
            return noted.state, noted.reason
        unfinished = noted.reason if noted is not None and noted.state == RECORDING else None
        return (READY if usable else RECORDING), problem or unfinished

    def to_json(self) -> dict:
        """Return what the panel shows of it."""
        state, reason = self.state()
        return {
            "id": self.id,
            "name": self.name,
            "source": self.source,
            "state": state,
            "reason": reason,
            "usable": self.statistics is not None and store.is_usable(self.statistics),
            "sampling": is_sampling(self.fingerprint),
            "loaded": _loaded(self.alive, self.source),
            "samples": 0 if self.statistics is None else self.statistics.samples,
            "calls": 0 if self.statistics is None else self.statistics.fewest_calls,
            "levels": 0 if self.statistics is None else seen_levels(self.statistics.meta),
            "layers": 0 if self.statistics is None else len(self.statistics),
            "total_layers": self.total_layers,
            "missing": _missing(self.statistics),
            "effects": measured_in(self.fingerprint),
            "last_run": self.last_run,
            "sessions": [_session_json(file) for file in self.files],
        }


class UnknownModelError(LookupError):
    """There is no such model, or it has no such session; the message says which."""


class Catalogue:
    """All models that were sampled, from disk and from memory.

    It reads files, so do not call it in the event loop. One thread at a time may call it.
    """

    def __init__(self, noted: Callable[[], list[ModelStatus]]) -> None:
        """Take a function that returns the samplings since ComfyUI started."""
        self._noted = noted

    def status(self) -> dict:
        """Return all models for the panel, the most recently sampled first."""
        chosen = settings.current()
        found, left = self._found(time.monotonic() + _SECONDS)
        models = [model.to_json() for model in found]
        models += [_without_file(noted) for noted in self._noted() if noted.fingerprint is None]
        models.sort(key=lambda model: model["last_run"] or "", reverse=True)
        return {
            "recording": chosen.record,
            "target": chosen.target,
            "usable": store.USABLE_SAMPLES,
            "usable_calls": store.USABLE_CALLS,
            "usable_levels": store.USABLE_LEVELS,
            "models": models,
            "reading": left,
        }

    def models(self) -> list[Model]:
        """Return all models that were loaded from a file, which may be gone."""
        return self._found(math.inf)[0]

    def _found(self, until: float) -> tuple[list[Model], int]:
        """Return the models, and how many more there are that were not read in time.

        If there are more, the listeners are told of a change, so that the panel asks again.
        """
        paths = heads.ids()
        noted = [one.fingerprint for one in self._noted() if one.fingerprint is not None]
        found = dict.fromkeys([*paths, *(its[:ID_DIGITS] for its in noted)])
        models, left = [], 0
        for its_id in found:
            try:
                models += self._models(its_id, paths.get(its_id, []), until)
            except heads.LateError:
                left += 1
        if left:
            changed()
        return models, left

    def model(self, its_id: str) -> Model:
        """Return the model of an id. The files of other models are not read.

        Raises:
            UnknownModelError: there is none.
        """
        for model in self._models(its_id):
            return model
        raise UnknownModelError(f"there is no model {its_id}")

    def _models(
        self, its_id: str, paths: list[Path] | None = None, until: float = math.inf
    ) -> list[Model]:
        """Return the models of an id: one or none; more if somebody forged an id."""
        its = heads.heads_of(its_id, paths, keep=True, until=until)
        recorded = {head.fingerprint: head for head in its.models}
        noted = {
            one.fingerprint: one
            for one in self._noted()
            if one.fingerprint is not None and one.fingerprint.startswith(its_id)
        }
        alive = alive_models()
        return [
            Model.of(one, recorded.get(one), noted.get(one), alive.get(one), its.problems)
            for one in dict.fromkeys([*recorded, *noted])
        ]


def _session_json(session: Session) -> dict:
    """Return what the panel shows of a session."""
    return {
        "session": session.name,
        "file": session.path.name,
        "samples": session.about.samples,
        "last_run": _text(session.about.meta.get("last_run")),
        "bytes": session.size,
    }


def _missing(statistics: Statistics | None) -> dict | None:
    """Return what other than images is missing until a model is ready, and how much it has."""
    what = None if statistics is None else store.missing(statistics)
    if what == store.LAYERS:
        layers = len(statistics)
        return {"what": what, "has": layers, "needs": layers + store.missing_layers(statistics)}
    if what == store.CALLS:
        return {"what": what, "has": statistics.fewest_calls, "needs": store.USABLE_CALLS}
    if what == store.NOISE:
        return {"what": what, "has": seen_levels(statistics.meta), "needs": store.USABLE_LEVELS}
    return None


def _loaded(alive: Alive | None, source: str | None) -> dict | None:
    if alive is None:
        return None
    try:
        sizes = shapes_of(source).sizes if source else Sizes({}, 0)
    except (OSError, ValueError):  # deleted or overwritten just now
        sizes = Sizes({}, 0)
    outcome = outcome_of_plan(alive.plan, sizes).to_json()
    return {"mode": alive.mode, "keep_ratio": alive.keep_ratio, "outcome": outcome}


def _without_file(noted: ModelStatus) -> dict:
    """Return what the panel shows of a model that was sampled but has no file, such as a merge."""
    return {
        "id": None,
        "name": noted.name,
        "source": None,
        "state": noted.state,
        "reason": noted.reason,
        "usable": False,
        "sampling": False,
        "loaded": None,
        "samples": 0,
        "calls": 0,
        "levels": 0,
        "layers": 0,
        "total_layers": None,
        "missing": None,
        "effects": {},
        "last_run": noted.last_run,
        "sessions": [],
    }


def _text(value: object) -> str | None:
    """Return a text from a file's meta, cut to a safe length: anybody may have written it."""
    return value[:_MAX_TEXT] if isinstance(value, str) and value else None
