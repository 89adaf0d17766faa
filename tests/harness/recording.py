"""What the tests of recording share: statistics and settings of a test's own, and a recorder.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.samplers
import folder_paths
import pytest
import torch
from hswq.calibration import LayerStatistics, Statistics, monitored_layers
from hswq.loader import store
from hswq.loader.engine import ahead
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.host.folders import FOLDER
from hswq.loader.recording.recorder import Recorder

from harness.modelfiles import end_hashing

CFGGuider = comfy.samplers.CFGGuider


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Statistics and settings for the test alone."""
    end_hashing()
    folders = folder_paths.folder_names_and_paths
    monkeypatch.setitem(folders, FOLDER, ([str(tmp_path / "hswq")], {".pt"}))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path / "hswq"


@pytest.fixture
def choose(folder: Path):
    """Changes the settings as ComfyUI's dialog does."""

    def write(**settings: object) -> None:
        path = folder.parent / "user" / "default" / "comfy.settings.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({f"HSWQ.{key}": value for key, value in settings.items()}))

    return write


@pytest.fixture
def recorder(folder: Path):
    """A recorder of the test's own."""
    own = CFGGuider.outer_sample
    recorder = Recorder()
    recorder.install()
    yield recorder
    CFGGuider.outer_sample = own
    ahead.wait()  # a GPU is prepared when a sampling was recorded


@pytest.fixture
def model(models):
    """The toy in 16 bit."""
    return models.sixteen_bit


def hooks(patcher) -> int:
    """Return how many hooks are on a model."""
    modules = patcher.model.diffusion_model.modules()
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in modules)


def recorded(checkpoint: Path) -> Statistics | None:
    """Return what was recorded of a file."""
    return store.statistics_of(fingerprint(str(checkpoint)))


@contextmanager
def measured(patcher, names: list[str]) -> Iterator[dict[str, list[LayerStatistics]]]:
    """Measure some layers' calls in float64, independently of the Dual Monitor."""
    layers = monitored_layers(patcher.model.diffusion_model)
    calls: dict[str, list[LayerStatistics]] = {name: [] for name in names}

    def measure(name: str):
        def hook(_, args, output):
            x, y = args[0].double(), output.double()
            axes = (0, 2, 3) if x.ndim == 4 else tuple(range(x.ndim - 1))
            sums = y.mean().item(), y.square().mean().item()
            calls[name].append(LayerStatistics(*sums, 1, x.abs().mean(axes).cpu(), 1))

        return hook

    handles = [layers[name].register_forward_hook(measure(name)) for name in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def assert_measured(found: Statistics, calls: dict[str, list[LayerStatistics]]) -> None:
    """Check that statistics are the sums of all these calls."""
    for name, its in calls.items():
        layer = found[name]
        assert layer.calls == layer.input_calls == len(its) > 0, name
        square = sum(call.output_square_sum for call in its)
        assert layer.output_square_sum == pytest.approx(square, rel=1e-5)
        size = (square * len(its)) ** 0.5  # the sum itself may be near zero
        total = sum(call.output_sum for call in its)
        assert layer.output_sum == pytest.approx(total, abs=1e-5 * size)
        importance = sum(call.importance_sum for call in its)
        torch.testing.assert_close(layer.importance_sum, importance, rtol=1e-5, atol=0)
