"""The file of sketches: a safetensors file beside the statistics file of the same recording.

Sketches serve compensated rounding only. Without the file, or with a damaged one, everything else
works: the sums are in the statistics file, which other tools read too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ...calibration import Sketch, Statistics, atomic_file
from ...calibration.sketch import SIZE as SKETCH_SIZE
from ..files.mapped_file import MappedFile
from ..files.safetensors import TensorEntry
from ..files.tensor_file import lay_out
from . import locked_file
from .sketch_sets import Sketches

SUFFIX = ".sketch.safetensors"
FORMAT = "hswq_sketches_v1"
MAX_FILE_BYTES = 1 << 30
"""SDXL's sketches are 112 MB."""
MAX_HEADER_BYTES = 8 << 20
MAX_ROWS = 1 << 53

_ROWS, _SCALE = "rows", ".scale"


class Origin(NamedTuple):
    """Where sketches come from.

    Attributes:
        fingerprint: of the model's weights; None for a model without a file.
        session: of the recording.
        recordings: ids of the recordings that are in them.
        samples: of the milestone that they were kept at; None for a session's, which grow.
    """

    fingerprint: str | None
    session: str
    recordings: frozenset[str]
    samples: int | None = None


def beside(statistics: Path) -> Path:
    """Return the path of the sketches of a statistics file."""
    return statistics.with_name(statistics.name.removesuffix(".pt") + SUFFIX)


def write(statistics: Path, sketches: Sketches, origin: Origin) -> None:
    """Replace the sketches beside a statistics file whose lock is held, one in memory at a time.

    The given sketches are closed, because some may be read from the file that is replaced.

    Raises:
        OSError: it cannot be written; it is unchanged.
    """
    path = beside(statistics)
    locked_file.sweep(path)
    groups = list(sketches.groups().values())
    layout = lay_out(_shapes(sketches, groups), _metadata(origin, groups))
    rows = torch.zeros(len(groups), dtype=torch.int64)
    with atomic_file(path) as file:
        layout.begin(file)
        for place, names in enumerate(groups):
            sketch = sketches.get(names[0])
            if sketch is None:  # it is damaged in the old file; 0 rows say that there is none
                sketch = Sketch(torch.zeros(SKETCH_SIZE, sketches.channels(names[0])), 0)
            rows[place] = sketch.rows
            data, scale = _rounded(sketch.matrix)
            layout.write(file, str(place), data)
            layout.write(file, f"{place}{_SCALE}", scale)
        layout.write(file, _ROWS, rows)
        sketches.close()  # Windows cannot replace a file that is mapped


def _shapes(sketches: Sketches, groups: list[list[str]]) -> dict[str, tuple]:
    shapes: dict[str, tuple] = {_ROWS: (torch.int64, (len(groups),))}
    for place, names in enumerate(groups):
        channels = sketches.channels(names[0])
        shapes[str(place)] = torch.int8, (SKETCH_SIZE, channels)
        shapes[f"{place}{_SCALE}"] = torch.float32, (channels,)
    return shapes


def _metadata(origin: Origin, groups: list[list[str]]) -> dict[str, str]:
    milestone = {} if origin.samples is None else {"samples": str(origin.samples)}
    return {
        **milestone,
        "format": FORMAT,
        "size": str(SKETCH_SIZE),
        "fingerprint": origin.fingerprint or "",
        "session": origin.session,
        "recordings": " ".join(sorted(origin.recordings)),
        "layers": json.dumps(groups, separators=(",", ":")),
    }


def _rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in INT8 with an FP32 scale for each channel.

    The rounding error is 1% of a channel, which is small against the 9% by which a sketch of 128
    rows is off anyway.
    """
    matrix = matrix.to(torch.float32)
    scale = (matrix.abs().amax(0) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (matrix / scale).round_().to(torch.int8), scale


def open_beside(
    path: Path, statistics: Statistics, recordings: frozenset[str], samples: int | None = None
) -> SketchFile | None:
    """Return the sketches of a statistics file; None if it has none.

    A file that is damaged, or belongs to other statistics, is reported in the log and ignored.

    Args:
        path: of the statistics file.
        statistics: the content of that file.
        recordings: ids of the recordings in it.
        samples: of a milestone, which must be the sketches' too; None for a session.
    """
    path = beside(path)
    try:
        return SketchFile(path, statistics, recordings, samples)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logging.warning("HSWQ: %s is not used: %s", path.name, str(error).split("\n", 1)[0])
        return None


class SketchFile(Sketches):
    """A file of sketches. Each is read from the mapped file when it is asked for.

    Attributes:
        recordings: ids of the recordings in it.
        version: SHA-256 (hex) that changes when the content does.
    """

    def __init__(
        self,
        path: Path,
        statistics: Statistics,
        recordings: frozenset[str],
        samples: int | None = None,
    ) -> None:
        """Open a file; for the arguments see open_beside.

        Raises:
            OSError: it cannot be read; FileNotFoundError: it does not exist.
            ValueError: it is damaged, or belongs to other statistics.
        """
        self._path = path
        _check_size(path)
        self._file = MappedFile(path)
        metadata = self._file.metadata
        self.recordings = _recordings_of(metadata, statistics, recordings, samples)
        self._places = _places(metadata.get("layers", ""))
        count = 1 + max(self._places.values(), default=-1)
        self._channels = [self._channels_of(str(place)) for place in range(count)]
        rows = self._file.entries.get(_ROWS)
        if rows is None or (rows.dtype, rows.shape) != ("I64", (count,)):
            raise ValueError("it has no number of rows for each sketch")
        self._rows = self._file.read(_ROWS)
        if (self._rows < 0).any() or (self._rows > MAX_ROWS).any():
            raise ValueError(f"it has a sketch of {self._rows.tolist()} rows")
        facts = json.dumps([metadata, self._rows.tolist()], sort_keys=True)
        self.version = hashlib.sha256(facts.encode()).hexdigest()
        self._check_channels(statistics)

    def __getitem__(self, name: str) -> Sketch:
        place = self._places[name]
        rows = self._rows[place].item()
        scale = self._file.read(f"{place}{_SCALE}")
        if not rows or not (128 * scale).isfinite().all():
            if rows:
                logging.warning("HSWQ: %s: the sketch of %s is damaged", self._path.name, name)
            raise KeyError(name)
        return Sketch(self._file.read(str(place)).to(torch.float32) * scale, rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Close the file."""
        self._file = None

    def key(self, name: str) -> Hashable:
        """Return the sketch's number in the file."""
        return self._places.get(name)

    def channels(self, name: str) -> int:
        """Return the input channels of a layer's sketch."""
        return self._channels[self._places[name]]

    def _check_channels(self, statistics: Statistics) -> None:
        for name, place in self._places.items():
            its = statistics.get(name)
            channels = self._channels[place] if its is None else its.importance_sum.numel()
            if channels not in (self._channels[place], 0):  # 0: importances were not read
                raise ValueError(
                    f"layer {name!r} has {channels} channels, its sketch {self._channels[place]}"
                )

    def _channels_of(self, key: str) -> int:
        nothing = TensorEntry("missing", (), 0, 0)
        part, scale = (self._file.entries.get(one, nothing) for one in (key, key + _SCALE))
        channels = (*part.shape, 0, 0)[1]
        found = part.dtype, part.shape, scale.dtype, scale.shape
        if not channels or found != ("I8", (SKETCH_SIZE, channels), "F32", (channels,)):
            raise ValueError(f"sketch {key} is {found[0]} and {found[2]} of shape {found[1]}")
        return channels


def _recordings_of(
    metadata: dict[str, str],
    statistics: Statistics,
    recordings: frozenset[str],
    samples: int | None,
) -> frozenset[str]:
    """Return the ids of the recordings in a file; refuse one that belongs to other statistics."""
    if (metadata.get("format"), metadata.get("size")) != (FORMAT, str(SKETCH_SIZE)):
        raise ValueError(f"it is not a {FORMAT} file of {SKETCH_SIZE} rows")
    if metadata.get("fingerprint") != (statistics.fingerprint or ""):
        raise ValueError("it belongs to another model")
    found = frozenset(metadata.get("recordings", "").split())
    if not found or not found <= recordings:
        raise ValueError("it belongs to another recording than the statistics beside it")
    if metadata.get("samples") != (None if samples is None else str(samples)):
        raise ValueError("it belongs to another milestone than the statistics beside it")
    return found


def _check_size(path: Path) -> None:
    """Refuse a file that is too large before anything parses it."""
    with open(path, "rb") as file:
        size, lead = os.fstat(file.fileno()).st_size, file.read(8)
    if size > MAX_FILE_BYTES or len(lead) < 8:
        raise ValueError(f"it has {size} bytes")
    header = struct.unpack("<Q", lead)[0]
    if header > MAX_HEADER_BYTES:
        raise ValueError(f"its header says that it has {header} bytes")


def _places(text: str) -> dict[str, int]:
    """Parse a JSON list of lists of layer names: return the number of each layer's sketch."""
    try:
        groups = json.loads(text)
    except RecursionError:
        raise ValueError("its layers are nested too deeply") from None
    if not isinstance(groups, list) or not all(isinstance(names, list) for names in groups):
        raise ValueError("its layers are not lists of names")
    places = {}
    for place, names in enumerate(groups):
        for name in names:
            if not isinstance(name, str) or name in places:
                raise ValueError(f"its layers have {name!r} twice, or it is not a name")
            places[name] = place
    if len(set(places.values())) < len(groups):
        raise ValueError("it has a sketch that belongs to no layer")
    return places
