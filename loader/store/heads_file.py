"""What is kept of a model's statistics files on disk: heads, and sums of each (see heads.py)."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from ...calibration import LayerStatistics, Statistics, StatisticsError
from ..files import kept_json, owners
from ..host.folders import statistics_folder
from .paths import SHORT

FILE = re.compile(r".+\.(?P<id>[0-9a-f]{16})\.(?P<session>[A-Za-z0-9][A-Za-z0-9_-]{0,63})\.pt")
"""Names of statistics files."""

NOTHING = torch.empty(0, dtype=torch.float64)
"""In place of a layer's importances."""

_FORMAT = 3

Version = owners.Version


@dataclasses.dataclass(frozen=True)
class Session:
    """One statistics file.

    Attributes:
        path: of the file.
        size: of the file in bytes.
        about: statistics with the file's meta and no layers.
    """

    path: Path
    size: int
    about: Statistics

    @property
    def name(self) -> str:
        """The session's name."""
        return FILE.fullmatch(self.path.name)["session"]


@dataclasses.dataclass(frozen=True)
class Head:
    """What the statistics files of one model hold.

    Attributes:
        fingerprint: of the model's weights.
        sessions: its files, in the order of their names.
        total: their sums by total_of; every layer's importance has no channels.
    """

    fingerprint: str
    sessions: tuple[Session, ...]
    total: Statistics


@dataclasses.dataclass(frozen=True)
class Heads:
    """What all statistics files with the same id hold.

    Attributes:
        versions: of the files, by name (see files.versions).
        models: one for each model that they were recorded of; more than one if an id was forged.
        problems: a sentence about each file that cannot be read.
    """

    versions: Mapping[str, Version]
    models: tuple[Head, ...]
    problems: tuple[str, ...] = ()


class _KeptSums(Statistics):
    """Sums whose layers are built when somebody asks for one: a status of many models does not.

    Attributes:
        text: the layers as they are on disk.
    """

    def __init__(self, count: int, fewest_calls: int, layers: str, meta: Mapping) -> None:
        """Take what `_sums` returns.

        Raises:
            TypeError: it is of other kinds.
        """
        kinds = (count, int), (fewest_calls, int), (layers, str), (meta, dict)
        if not all(isinstance(*one) for one in kinds):
            raise TypeError("the sums are not as they were written")
        self.meta = MappingProxyType(dict(meta))
        self.fewest_calls, self._count, self.text = fewest_calls, count, layers

    @functools.cached_property
    def _layers(self) -> Mapping[str, LayerStatistics]:
        try:
            return {name: _layer(*numbers) for name, numbers in json.loads(self.text).items()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            its_id = str(self.fingerprint)[:SHORT]
            raise StatisticsError(
                f"what is kept of the statistics of {its_id} was forged: delete plans/{its_id}.*"
            ) from error

    def __len__(self) -> int:
        return self._count


def write(path: Path, heads: Heads) -> None:
    """Write heads to disk. If that fails, the files are read again after the next start."""
    try:
        models = [_described(head) for head in heads.models]
        kept_json.write(path, {"format": _FORMAT, "versions": heads.versions, "models": models})
    except (OSError, ValueError) as error:
        logging.debug("HSWQ: heads are not kept: %s", error)


def read(path: Path) -> Heads | None:
    """Read what `write` has written; None if there is nothing, or it is damaged."""
    try:
        content = kept_json.read(path)
        if content["format"] != _FORMAT:
            return None
        versions = {name: tuple(version) for name, version in content["versions"].items()}
        models = [_model(one, versions) for one in content["models"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Heads(versions, tuple(models))


def write_files(path: Path, files: Mapping[str, tuple[Version, Statistics]]) -> None:
    """Write the sums of each statistics file, without importances, by the file's name.

    With them, a sampling that changes one file need not read the others to sum up all.
    """
    try:
        found = {name: [version, _sums(sums)] for name, (version, sums) in files.items()}
        kept_json.write(path, {"format": _FORMAT, "files": found})
    except (OSError, ValueError) as error:
        logging.debug("HSWQ: sums of files are not kept: %s", error)


def read_files(path: Path) -> dict[str, tuple[Version, Statistics]]:
    """Read what `write_files` has written; empty if there is none, or it is damaged or forged."""
    try:
        content = kept_json.read(path)
        if content["format"] != _FORMAT:
            return {}
        found = {
            name: (tuple(version), _KeptSums(**sums))
            for name, (version, sums) in content["files"].items()
        }
        for _, sums in found.values():
            iter(sums)  # builds the layers, which are about to be added up
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _described(head: Head) -> dict:
    sessions = {one.path.name: dict(one.about.meta) for one in head.sessions}
    return {"fingerprint": head.fingerprint, "sessions": sessions, "sums": _sums(head.total)}


def _model(one: Mapping, versions: Mapping[str, Version]) -> Head:
    folder = statistics_folder()
    sessions = [
        Session(folder / name, versions[name][1], Statistics(meta=meta))
        for name, meta in one["sessions"].items()
    ]
    return Head(one["fingerprint"], tuple(sessions), _KeptSums(**one["sums"]))


def _sums(sums: Statistics) -> dict:
    """Return sums without importances. The layers are a text, which is parsed when needed."""
    if isinstance(sums, _KeptSums):
        text = sums.text
    else:
        layers = {name: _numbers(layer) for name, layer in sums.items()}
        text = json.dumps(layers, allow_nan=False)
    facts = {"count": len(sums), "fewest_calls": sums.fewest_calls}
    return {**facts, "layers": text, "meta": dict(sums.meta)}


def _numbers(layer: LayerStatistics) -> tuple:
    sums = layer.output_sum, layer.output_square_sum, layer.output_calls
    return *sums, layer.input_calls, layer.input_amax


def _layer(
    total: float, squares: float, calls: int, input_calls: int, amax: float | None
) -> LayerStatistics:
    numbers = total, squares, amax or 0.0
    if not (type(calls) is type(input_calls) is int and all(map(math.isfinite, numbers))):
        raise TypeError("a layer's sums are not as they were written")
    return LayerStatistics(total, squares, calls, NOTHING, input_calls, amax)
