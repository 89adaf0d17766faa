"""The file of heads: what is kept on disk of a model's statistics files (see heads.py)."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from ...calibration import LayerStatistics, Statistics
from ..files import kept_json, owners
from ..host.folders import statistics_folder

FILE = re.compile(r".+\.(?P<id>[0-9a-f]{16})\.(?P<session>[A-Za-z0-9][A-Za-z0-9_-]{0,63})\.pt")
"""Names of statistics files."""

NOTHING = torch.empty(0, dtype=torch.float64)
"""In place of a layer's importances."""

_FORMAT = 2

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
    """Sums whose layers are built when somebody asks for one: a status of many models does not."""

    def __init__(self, count: int, fewest_calls: int, layers: str, meta: Mapping) -> None:
        self.meta = MappingProxyType(dict(meta))
        self.fewest_calls, self._count, self._text = fewest_calls, count, layers

    @functools.cached_property
    def _layers(self) -> Mapping[str, LayerStatistics]:
        return {name: _layer(*numbers) for name, numbers in json.loads(self._text).items()}

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


def _described(head: Head) -> dict:
    layers = {name: _numbers(layer) for name, layer in head.total.items()}
    return {
        "fingerprint": head.fingerprint,
        "sessions": {one.path.name: dict(one.about.meta) for one in head.sessions},
        "meta": dict(head.total.meta),
        "count": len(layers),
        "fewest_calls": head.total.fewest_calls,
        "layers": json.dumps(layers, allow_nan=False),  # as text, which is parsed when needed
    }


def _model(one: Mapping, versions: Mapping[str, Version]) -> Head:
    folder = statistics_folder()
    sessions = [
        Session(folder / name, versions[name][1], Statistics(meta=meta))
        for name, meta in one["sessions"].items()
    ]
    kinds = {"count": int, "fewest_calls": int, "layers": str}
    if not all(isinstance(one[key], kind) for key, kind in kinds.items()):
        raise TypeError("the sums are not as they were written")
    total = _KeptSums(one["count"], one["fewest_calls"], one["layers"], one["meta"])
    return Head(one["fingerprint"], tuple(sessions), total)


def _numbers(layer: LayerStatistics) -> tuple:
    sums = layer.output_sum, layer.output_square_sum, layer.output_calls
    return *sums, layer.input_calls, layer.input_amax


def _layer(
    total: float, squares: float, calls: int, input_calls: int, amax: float | None
) -> LayerStatistics:
    return LayerStatistics(total, squares, calls, NOTHING, input_calls, amax)
