"""Files that were changed at random: statistics, sketches, headers of models, caches."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from hswq.calibration import Statistics, StatisticsError, load_statistics, save_statistics
from hswq.calibration.statistics import LayerStatistics
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.layer_formats import stored_scale
from hswq.loader.files.model_file import ModelFile
from hswq.loader.files.safetensors import read_header
from hswq.loader.host.folders import statistics_folder
from hswq.loader.store import sketch_file
from safetensors.torch import save

from harness.sketches import CHANNELS, record

LAYERS = 20


class Attack:
    """Mutations of one good file.

    Attributes:
        path: that they are written to.
    """

    def __init__(
        self, path: Path, mutate: Callable[[], bytes], read: Callable[[Path], bool]
    ) -> None:
        """Take what makes a file's bytes, and what tells whether they are believed."""
        self.path, self._mutate, self._read = path, mutate, read

    def write(self) -> bytes:
        """Write the next one, and return it."""
        content = self._mutate()
        self.path.write_bytes(content)
        return content

    def is_refused(self) -> bool:
        """Whether the one that was written is refused, by our own error in one line."""
        try:
            return not self._read(self.path)
        except (StatisticsError, ModelFileError) as error:
            text = str(error)
            assert self.path.name in text
            assert "\n" not in text
            assert len(text) < 400
            return True


def mutated(data: bytes, numbers: random.Random) -> bytes:
    """Change, remove, repeat or insert parts."""
    changed = bytearray(data)
    for _ in range(numbers.choice((1, 1, 2, 8))):
        at = numbers.randrange(max(1, len(changed)))
        length = numbers.choice((1, 1, 2, 4, 8, 64))
        part = numbers.choice((
            numbers.randbytes(length), b"\0" * length, b"\xff" * length, b"9" * length, b"",
            bytes(changed[at : at + length]) * 2, b"[{" * length, b"1e999", b"-", b"NaN",
        ))  # fmt: skip
        changed[at : at + length] = part
    return bytes(changed)


def made_up() -> Statistics:
    """Return statistics of some layers."""
    importance = torch.arange(1, 5, dtype=torch.float64)
    one = LayerStatistics(1.0, 2.0, 1, importance, 1)
    meta = {"samples": 1, "layers": LAYERS, "fingerprint": "ab" * 32}
    return Statistics({f"layer{number}": one for number in range(LAYERS)}, meta)


def statistics(folder: Path, numbers: random.Random) -> Attack:
    """Mutate the whole of a statistics file."""
    path = folder / "statistics.pt"
    save_statistics(made_up(), path)
    good = path.read_bytes()
    return Attack(path, lambda: mutated(good, numbers), _is_statistics)


def pickles(folder: Path, numbers: random.Random) -> Attack:
    """Mutate what a statistics file says, under right checksums."""
    path = folder / "pickle.pt"
    save_statistics(made_up(), path)
    good = path.read_bytes()

    def mutate() -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(out, "w") as target:
            for member in source.infolist():
                data = source.read(member)
                if member.filename.endswith(".pkl"):
                    data = mutated(data, numbers)
                target.writestr(member.filename, data)
        return out.getvalue()

    return Attack(path, mutate, _is_statistics)


def headers(folder: Path, numbers: random.Random) -> Attack:
    """Mutate the header of a model file."""
    path = folder / "model.safetensors"
    good = save({f"{n}.weight": torch.ones(4, 4).half() for n in range(LAYERS)}, {"a": "b"})
    length = struct.unpack("<Q", good[:8])[0]

    def mutate() -> bytes:
        text = mutated(good[8 : 8 + length], numbers)
        told = len(text) if numbers.random() < 0.9 else numbers.choice((0, 1, length, 2**63))
        return struct.pack("<Q", told) + text + good[8 + length :]

    def is_believed(path: Path) -> bool:
        size = path.stat().st_size
        entries = read_header(str(path)).values()
        assert all(0 <= entry.start <= entry.end <= size for entry in entries)
        return len(ModelFile(path).read_fingerprint()) == 64

    return Attack(path, mutate, is_believed)


def sketches(folder: Path, numbers: random.Random) -> Attack:
    """Mutate the safetensors file beside a statistics file."""
    record(1)
    path = next(statistics_folder().glob("*" + sketch_file.SUFFIX))
    beside = path.with_name(path.name.replace(sketch_file.SUFFIX, ".pt"))
    its, good = load_statistics(beside), path.read_bytes()
    ids = frozenset({its.meta["recording"]})
    length = struct.unpack("<Q", good[:8])[0]

    def mutate() -> bytes:
        if numbers.random() < 0.2:
            return mutated(good, numbers)
        text = mutated(good[8 : 8 + length], numbers)
        return struct.pack("<Q", len(text)) + text + good[8 + length :]

    def is_believed(_: Path) -> bool:
        found = sketch_file.open_beside(beside, its, ids)
        for name in found or ():
            try:
                sketch = found[name]
            except KeyError:
                continue
            assert name not in CHANNELS or sketch.matrix.shape[1] == CHANNELS[name]
            assert sketch.matrix.isfinite().all()
        return found is not None

    return Attack(path, mutate, is_believed)


def int8_layers(folder: Path, numbers: random.Random) -> Attack:
    """Mutate what a model file in INT8 has beside its weights, and how its header tells of it."""
    path = folder / "int8.safetensors"
    marker = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    tensors = {}
    for number in range(LAYERS):
        tensors[f"{number}.weight"] = torch.ones(4, 4, dtype=torch.int8)
        tensors[f"{number}.weight_scale"] = torch.full(((4, 1), (4,), ())[number % 3], 0.1)
        tensors[f"{number}.comfy_quant"] = marker.clone()
    good = save(tensors)
    return Attack(path, lambda: mutated(good, numbers), _are_layers)


def _are_layers(path: Path) -> bool:
    """Whether all quantized layers of a file are believed; their scales are as they should be."""
    file = ModelFile(path)
    assert isinstance(file.is_quantized, bool)
    tensors = file.tensors
    for key, weight in tensors.items():
        if not key.endswith("weight") or weight.dtype.itemsize > 1:
            continue
        try:
            scale = stored_scale(tensors, key.removesuffix("weight"))
        except ModelFileError as error:  # about a layer; who loads the file says which file
            raise ModelFileError(f"{file.name}: {error}") from None
        shape = (len(weight), 1) if weight.dtype is torch.int8 else ()
        assert (scale.dtype, tuple(scale.shape)) == (torch.float32, shape)
        assert ((scale > 0) & scale.isfinite()).all()
    return True


def _is_statistics(path: Path) -> bool:
    return isinstance(load_statistics(path), Statistics)
