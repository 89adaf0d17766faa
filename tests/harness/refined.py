"""What the tests of quantized models on disk share: the toy's layers, and keeping them.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from hswq.loader.engine.model_structure import layers_of
from hswq.loader.files.model_file import ModelFile
from hswq.loader.store import refined
from hswq.quant import FP8_SCALED, quantize

MODEL = "ab" * 32
KEY = f"{MODEL[:16]}.{'0' * 32}"


@functools.cache
def fp8_layers(checkpoint: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return all layers of a file in FP8, with their scales."""
    return {
        name: quantize(weight, weight.abs().max().item(), scaled=True)
        for name, weight in layers_of(ModelFile(checkpoint)).items()
    }


def keep(layers: dict, key: str = KEY) -> Path:
    """Keep layers, and return where."""
    parts = ((name, *part) for name, part in layers.items())
    refined.keep(
        key, FP8_SCALED, parts, {name: tuple(data.shape) for name, (data, _) in layers.items()}
    )
    return refined.refined_folder() / f"{key}.safetensors"


def left() -> list[str]:
    """Return the names of all files that are kept, finished or not."""
    folder = refined.refined_folder()
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
