"""Brings ComfyUI up in this process, with the toy SDXL in 16 bit and quantized.

Where there is an NVIDIA GPU all of it runs there, with ComfyUI's own memory management and under
Dynamic VRAM; elsewhere on the CPU.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from bench import common

BASE = tempfile.TemporaryDirectory(prefix="hswq-comfyui-")
DYNAMIC_VRAM = common.start_comfyui(
    None,
    "--base-directory",
    BASE.name,
    "--use-pytorch-cross-attention",  # as on a GPU
    dynamic=True,
)

import comfy.memory_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from harness import inprocess  # noqa: E402
from harness.exports import folders, plans, recorded  # noqa: E402, F401
from harness.recording import choose, folder, model, recorder  # noqa: E402, F401
from harness.trained import recorded_once, trained  # noqa: E402, F401
from helpers import make_planner  # noqa: E402
from hswq.calibration import Statistics  # noqa: E402
from hswq.loader.engine import loading  # noqa: E402
from hswq.quant import Planner, SearchSettings  # noqa: E402
from toy.checkpoint import make_checkpoint  # noqa: E402

# The toy's layers are too small to share, and the machine may have other work.
torch.set_num_threads(1)


class Models(NamedTuple):
    """The toy once in 16 bit and once quantized from it; both are clones for the test alone."""

    sixteen_bit: ModelPatcher
    quantized: ModelPatcher


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The toy checkpoint, in FP16."""
    return make_checkpoint(Path(BASE.name) / "models" / "checkpoints" / "toy.safetensors")


@pytest.fixture(autouse=True)
def inference_mode():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(params=["legacy", "dynamic"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both of ComfyUI's ways to manage memory; under Dynamic VRAM our models begin on the host."""
    if request.param == "dynamic":
        if not DYNAMIC_VRAM:
            pytest.skip("Dynamic VRAM needs an NVIDIA GPU")
        monkeypatch.setattr(loading, "make_room", lambda *_: False)
    use_dynamic_vram(monkeypatch, request.param == "dynamic")
    return request.param


def use_dynamic_vram(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    """Turn it on or off, as ComfyUI's main.py does for good."""
    patchers = {True: comfy.model_patcher.ModelPatcherDynamic, False: ModelPatcher}
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", patchers[dynamic])
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", dynamic)


@pytest.fixture(scope="session", autouse=True)
def legacy_elsewhere():
    """Tests that do not ask for a memory mode have the one that they have on a CPU."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_dynamic_vram(monkeypatch, False)
        yield


@pytest.fixture
def dynamic_vram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic VRAM as users have it, where our models that fit do without."""
    if not DYNAMIC_VRAM:
        pytest.skip("Dynamic VRAM needs an NVIDIA GPU")
    use_dynamic_vram(monkeypatch, True)


@pytest.fixture
def legacy(memory: str) -> None:
    """For what ComfyUI has only without Dynamic VRAM; there is no such test under it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that ask for `legacy`, by fixture or mark, under Dynamic VRAM."""
    none = [
        item
        for item in items
        if ("legacy" in getattr(item, "fixturenames", ()) or item.get_closest_marker("legacy"))
        and item.callspec.params.get("memory") == "dynamic"
    ]
    config.hook.pytest_deselected(items=none)
    items[:] = [item for item in items if item not in none]


@pytest.fixture(scope="session")
def statistics(checkpoint: Path) -> Statistics:
    """Statistics of the toy's layers."""
    return common.made_up_statistics(inprocess.load_16_bit(checkpoint))


@pytest.fixture(scope="session")
def planner(statistics: Statistics) -> Callable[..., Planner]:
    """Make a Planner for the toy, which searches roughly: planner(keep_ratio, scaled=...)."""

    def make(keep_ratio: float = 0.25, *, scaled: bool = True) -> Planner:
        settings = SearchSettings(bins=256, candidates=20, refinements=1)
        return make_planner(statistics, keep_ratio, scaled=scaled, settings=settings)

    return make


@pytest.fixture(scope="session")
def loaded() -> dict[str, tuple]:
    """The models of every memory mode, loaded once."""
    return {}


@pytest.fixture
def models(
    memory: str,
    checkpoint: Path,
    planner: Callable[..., Planner],
    loaded: dict[str, tuple],
    inference_mode: None,
):
    """The toy in 16 bit and quantized. What a test leaves in their weights is an error."""
    if memory not in loaded:
        sixteen_bit = inprocess.load_16_bit(checkpoint)
        quantized = loading.load_checkpoint(str(checkpoint), planner(), only_model=True)[0]
        originals = Models(sixteen_bit, quantized)
        loaded[memory] = originals, Models(*map(inprocess.held, originals))
        inprocess.unload()
    originals, before = loaded[memory]
    yield Models(*(patcher.clone() for patcher in originals))
    inprocess.unload()
    for patcher, weights in zip(originals, before, strict=True):
        assert not inprocess.same(inprocess.held(patcher), weights)
