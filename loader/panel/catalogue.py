"""What is known of each model: its statistics files, its last sampling, its FP8 copy in memory."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from ...calibration import Statistics, StatisticsError, load_statistics, seen_levels
from .. import store
from ..engine.alive import Alive, alive_models
from ..host import folders, settings
from ..jobs.model_files import find_source
from ..recording.status import (
    COMPLETE,
    FAILED,
    NOT_RECORDED,
    QUANTIZED,
    RECORDING,
    ModelStatus,
    is_sampling,
)
from ..store import locked_file

READY = "ready"
ID_DIGITS = 16
_MAX_TEXT = 200
_FILE = re.compile(r".+\.(?P<id>[0-9a-f]{16})\.(?P<session>[A-Za-z0-9][A-Za-z0-9_-]{0,63})\.pt")


@dataclasses.dataclass(frozen=True)
class StatisticsFile:
    """One session of a model.

    Attributes:
        path: of the file.
        session: its name.
        size: of the file in bytes.
        statistics: without importances, which would take most of the memory.
    """

    path: Path
    session: str
    size: int
    statistics: Statistics

    def to_json(self) -> dict:
        """Return what the panel shows of it."""
        return {
            "session": self.session,
            "file": self.path.name,
            "samples": self.statistics.samples,
            "last_run": _text(self.statistics.meta.get("last_run")),
            "bytes": self.size,
        }


@dataclasses.dataclass(frozen=True)
class Model:
    """All that is known of one model.

    Attributes:
        fingerprint: of its weights.
        files: its sessions.
        statistics: of all of them, without importances; None where there are none.
        noted: its last sampling since ComfyUI started; None where there was none.
        alive: its FP8 copy in memory; None where there is none.
        name: of its file, which may be gone.
        source: where its file is now, as the nodes take it; None where it is gone.
        problems: a sentence about each of its sessions that cannot be read.
    """

    fingerprint: str
    files: list[StatisticsFile]
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
        files: list[StatisticsFile],
        noted: ModelStatus | None,
        alive: Alive | None,
        problems: tuple[str, ...] = (),
    ) -> Model:
        """Put together what is known, and look for the model's file."""
        statistics = store.total_of([file.statistics for file in files])
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
        """When it was last sampled, as an ISO time."""
        times = [_text(file.statistics.meta.get("last_run")) for file in self.files]
        times.append(self.noted and self.noted.last_run)
        return max(filter(None, times), default=None)

    @property
    def total_layers(self) -> int | None:
        """How many layers it has; None where its statistics do not say."""
        if self.statistics is None or "layers" not in self.statistics.meta:
            return None
        return len(self.statistics) + store.missing_layers(self.statistics)

    def state(self) -> tuple[str, str | None]:
        """Return what recording does with it, and why where it does nothing or lacks a session."""
        known, noted = self.statistics, self.noted
        problem = self.problems[0] if self.problems else None
        if known is not None and store.is_complete(known):
            return COMPLETE, problem
        usable = known is not None and store.is_usable(known)
        done = usable and noted is not None and noted.reason == QUANTIZED
        if noted is not None and noted.state in (NOT_RECORDED, FAILED) and not done:
            return noted.state, noted.reason
        return (READY if usable else RECORDING), problem

    def to_json(self) -> dict:
        """Return what the panel shows of it."""
        state, reason = self.state()
        return {
            "id": self.id,
            "name": self.name,
            "source": self.source,
            "state": state,
            "reason": reason,
            "sampling": is_sampling(self.fingerprint),
            "loaded": _loaded(self.alive),
            "samples": 0 if self.statistics is None else self.statistics.samples,
            "layers": 0 if self.statistics is None else len(self.statistics),
            "total_layers": self.total_layers,
            "missing": _missing(self.statistics),
            "last_run": self.last_run,
            "sessions": [file.to_json() for file in self.files],
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
        self._files: dict[Path, tuple[tuple, Statistics | str | None]] = {}

    def status(self) -> dict:
        """Return all models for the panel, the most recently sampled first."""
        chosen = settings.current()
        models = [model.to_json() for model in self.models()]
        models += [_without_file(noted) for noted in self._noted() if noted.fingerprint is None]
        models.sort(key=lambda model: model["last_run"] or "", reverse=True)
        return {
            "recording": chosen.record,
            "target": chosen.target,
            "usable": store.USABLE_SAMPLES,
            "models": models,
        }

    def models(self) -> list[Model]:
        """Return all models that were loaded from a file, which may be gone."""
        files: dict[str, list[StatisticsFile]] = {}
        found, problems = self._statistics_files()
        for file in found:
            files.setdefault(file.statistics.fingerprint, []).append(file)
        noted = {one.fingerprint: one for one in self._noted() if one.fingerprint is not None}
        alive = alive_models()
        return [
            Model.of(
                its,
                files.get(its, []),
                noted.get(its),
                alive.get(its),
                tuple(problems.get(its[:ID_DIGITS], ())),
            )
            for its in dict.fromkeys([*files, *noted])
        ]

    def model(self, its_id: str) -> Model:
        """Return the model of an id.

        Raises:
            UnknownModelError: there is none.
        """
        for model in self.models():
            if model.id == its_id:
                return model
        raise UnknownModelError(f"there is no model {its_id}")

    def _statistics_files(self) -> tuple[list[StatisticsFile], dict[str, list[str]]]:
        """Read those that are not known, and forget those that are gone.

        Returns:
            The files, and a sentence about each that cannot be read, by its model's id.
        """
        known, self._files = self._files, {}
        found, problems = [], {}
        for path in sorted(folders.statistics_folder().glob("*.pt")):
            match = _FILE.fullmatch(path.name)
            if match is None:
                continue
            try:
                version = locked_file.version_of(path)
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    problem = locked_file.unreadable(path, error)
                    problems.setdefault(match["id"], []).append(problem)
                continue
            if path not in known or known[path][0] != version:
                known[path] = version, _read(path)
            self._files[path] = known[path]
            statistics = known[path][1]
            if isinstance(statistics, str):
                problems.setdefault(match["id"], []).append(statistics)
            elif statistics is not None and statistics.fingerprint[:ID_DIGITS] == match["id"]:
                found.append(StatisticsFile(path, match["session"], version[1], statistics))
        return found, problems


def _read(path: Path) -> Statistics | str | None:
    """Read a file without its importances.

    Returns:
        A sentence where it cannot be read; None where it is gone, or of an unknown model.
    """
    try:
        statistics = locked_file.known(path) or load_statistics(path)
    except FileNotFoundError:
        return None
    except (StatisticsError, OSError) as error:
        problem = locked_file.unreadable(path, error)
        logging.warning("HSWQ: %s", problem)
        return problem
    if not statistics.fingerprint:
        return None
    nothing = torch.empty(0, dtype=torch.float64)
    layers = {
        name: dataclasses.replace(layer, importance_sum=nothing)
        for name, layer in statistics.items()
    }
    return Statistics(layers, statistics.meta)


def _missing(statistics: Statistics | None) -> dict | None:
    """Return what else than images it takes until a model is ready: has so much of so much."""
    what = None if statistics is None else store.missing(statistics)
    if what == store.CALLS:
        return {"what": what, "has": store.fewest_calls(statistics), "needs": store.USABLE_CALLS}
    if what == store.NOISE:
        return {"what": what, "has": seen_levels(statistics.meta), "needs": store.USABLE_LEVELS}
    return None


def _loaded(alive: Alive | None) -> dict | None:
    if alive is None:
        return None
    return {"mode": alive.mode, "keep_ratio": alive.keep_ratio, "samples": alive.samples}


def _without_file(noted: ModelStatus) -> dict:
    """Return what the panel shows of a model that was sampled but has no file, such as a merge."""
    return {
        "id": None,
        "name": noted.name,
        "source": None,
        "state": noted.state,
        "reason": noted.reason,
        "sampling": False,
        "loaded": None,
        "samples": 0,
        "layers": 0,
        "total_layers": None,
        "missing": None,
        "last_run": noted.last_run,
        "sessions": [],
    }


def _text(value: object) -> str | None:
    """Return a text from a file's meta, cut short: anybody may have written it."""
    return value[:_MAX_TEXT] if isinstance(value, str) and value else None
