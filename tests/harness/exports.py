"""What the tests of the export share: folders, Plans, and exporting.

Import it where ComfyUI is up (tests/loader/conftest.py, which has the fixtures).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import folder_paths
import pytest
import torch
from hswq.loader import store
from hswq.loader.engine.model_structure import layers_of
from hswq.loader.engine.quantizer import quantizing_device
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.model_file import ModelFile
from hswq.loader.host.folders import register_folder
from hswq.loader.jobs import choice
from hswq.loader.jobs.export import export
from hswq.loader.jobs.export_settings import ExportSettings
from hswq.loader.jobs.output_path import export_path
from hswq.quant import FP8_SCALED, LayerPlan, Plan, QuantizeSettings, fp8_format, make_plan

from harness.modelfiles import end_hashing

SAMPLES = 40


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """An empty models folder, and an output folder whose models ComfyUI offers."""
    use_folders(tmp_path, monkeypatch)
    return tmp_path


def use_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give ComfyUI such folders until the patch is undone."""
    end_hashing()
    paths = {
        "checkpoints": ([str(tmp_path / "output" / "checkpoints")], {".safetensors"}),
        "diffusion_models": ([str(tmp_path / "output" / "diffusion_models")], {".safetensors"}),
        "embeddings": ([], set()),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    register_folder()


@pytest.fixture(scope="session")
def plans(checkpoint, statistics) -> dict[bool, Plan]:
    """The loader's Plans of the toy, of both modes; they are searched once for all tests."""
    layers = weights_of(checkpoint)
    return {scaled: make_plan(layers, statistics, 0.25, scaled) for scaled in (True, False)}


def decisions(plan: Plan) -> list[LayerPlan]:
    """Return what a Plan decides, without errors: a GPU sums in any order, to the last digit."""
    return [dataclasses.replace(layer, relative_error=None) for layer in plan.layers.values()]


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the layers' weights, where the loader searches them."""
    layers = layers_of(ModelFile(checkpoint))
    return {name: weight.to(quantizing_device(FP8_SCALED)) for name, weight in layers.items()}


@pytest.fixture
def recorded(checkpoint, statistics, plans) -> str:
    """The toy with enough recorded samples, loaded before."""
    path = str(checkpoint)
    record(path, statistics)
    for scaled, plan in plans.items():
        settings = QuantizeSettings(fp8_format(scaled))
        choice.choose(choice.AUTO, fingerprint(path), "", settings, choice.FAIL).keep(plan)
    return path


def record(path: str, statistics) -> None:
    delta = type(statistics)(statistics, {"samples": SAMPLES, "total_steps": 1})
    store.add_statistics(
        store.NewSums(delta, fingerprint(path), store.PASSIVE_SESSION, "toy.safetensors")
    )


def wanted(kind: str = "scaled", **changes) -> ExportSettings:
    return ExportSettings(
        **{
            "format": kind, "statistics": choice.AUTO, "keep_ratio": 0.25,
            "without": choice.FAIL, "model_only": False, **changes,
        }
    )  # fmt: skip


def target_of(settings: ExportSettings, name: str = "exported") -> Path:
    return export_path(name, "diffusion_models" if settings.model_only else "checkpoints")


def written(path: str, settings: ExportSettings) -> tuple[Path, Plan]:
    target = target_of(settings)
    return target, export(path, target, settings).plan


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and flat[0].equal(flat[1])
