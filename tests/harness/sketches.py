"""Sketches of a made-up model, for the tests of what keeps them.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from hswq.calibration import LayerStatistics, Sketch, Statistics
from hswq.calibration.sketch import SIZE
from hswq.loader import store
from hswq.loader.store import sketch_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MODEL = "ab" * 32
CHANNELS = {"q": 4, "k": 4, "v": 4, "out": 6}
SHARED = ("q", "k", "v")


def new_sketches(seed: int) -> dict[str, Sketch]:
    """One sketch for three layers, and one for another."""
    numbers = torch.Generator().manual_seed(seed)
    one, other = (
        Sketch(torch.randint(-99, 99, (SIZE, channels), generator=numbers).float(), 10 + seed)
        for channels in (4, 6)
    )
    return {**dict.fromkeys(SHARED, one), "out": other}


def record(
    seed: int, session: str = store.PASSIVE_SESSION, samples: int = 1, calls: int = 1
) -> dict[str, Sketch]:
    """Record a sampling as recorder.py does; return its sketches."""
    layers = {
        name: LayerStatistics(1.0, 2.0, calls, torch.ones(count, dtype=torch.float64), calls)
        for name, count in CHANNELS.items()
    }
    delta, new = Statistics(layers, {"samples": samples, "layers": 4}), new_sketches(seed)
    store.add_statistics(store.NewSums(delta, MODEL, session, "toy.safetensors", sketches=new))
    return new


def assert_sum(found: store.Sketches | None, *parts: dict[str, Sketch]) -> None:
    """Check sums of sketches but for INT8, and that who shares one still does."""
    assert found is not None
    assert set(found) == set(CHANNELS)
    for name in CHANNELS:
        exact = sum(part[name].matrix for part in parts)
        assert found[name].rows == sum(part[name].rows for part in parts)
        assert found[name].matrix.dtype == torch.float32
        # Each of them may have been rounded to 1/127 of a channel's largest value, or all together.
        bound = (
            0.51 / 127 * sum(part[name].matrix.abs().max().item() for part in parts) * len(parts)
        )
        torch.testing.assert_close(found[name].matrix, exact, rtol=0, atol=bound)
    assert sorted(map(sorted, found.groups().values())) == [["k", "q", "v"], ["out"]]
    q, k = found["q"], found["k"]
    assert isinstance(found, sketch_file.SketchFile) or q is k


def sidecar(folder: Path) -> Path:
    (path,) = folder.glob(f"*{sketch_file.SUFFIX}")
    return path


def rewritten(path: Path, change) -> None:
    """Change a file's tensors and metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata)
