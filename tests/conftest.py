"""Makes the repository importable as the package `hswq`.

ComfyUI imports it under its folder's name and runs the root `__init__.py`; the rooms that know
nothing of ComfyUI are tested without either.
"""

import os
import shutil
import sys
import types
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

if shutil.which("nvidia-smi"):  # as ComfyUI's main.py does, before torch is imported
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")

if "hswq" not in sys.modules:
    package = types.ModuleType("hswq")
    package.__path__ = [str(REPOSITORY)]
    sys.modules["hswq"] = package


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every torch device that the code is tested on."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no NVIDIA GPU")
    return torch.device(request.param)
