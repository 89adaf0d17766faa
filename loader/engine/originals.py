"""The 16-bit weights that quantized ones came from, read again when a patch goes onto them."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from comfy.model_base import BaseModel
from comfy.quant_ops import QuantizedTensor

from ...quant import Plan
from ..files.model_file import ModelFile
from ..files.safetensors import DTYPE_NAMES, is_safetensors
from ..files.versions import version_of

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Originals:
    """A model file's weights, layer by layer.

    A patched FP8 weight is rounded once more, which doubles the error and hides a weak LoRA. On
    the original, the result is that of quantizing the merged weights. Nothing of the file stays
    open or in memory.

    Attributes:
        plan: by which the weights were quantized, None while they are.
        is_sampled: whether their model is in a sampling.
    """

    def __init__(self, file: ModelFile) -> None:
        """Take a safetensors file; of others nothing is found."""
        self.plan: Plan | None = None
        self._model: weakref.ref[BaseModel] | None = None
        self._path, self._version = Path(file.path), file.version
        self._entries = file.own if is_safetensors(file.path) else {}

    def belong_to(self, model: BaseModel, plan: Plan) -> None:
        """Know whose weights they were, and how those were quantized."""
        self._model, self.plan = weakref.ref(model), plan

    @property
    def is_sampled(self) -> bool:
        model = None if self._model is None else self._model()
        # ComfyUI sets it before a sampling, and takes it off however that ends.
        return getattr(model, "current_patcher", None) is not None

    def of(self, layer: str, weight: QuantizedTensor) -> torch.Tensor | None:
        """Return what a quantized weight came from, on its device and in the dtype it stands for.

        None where that is not known: the file is gone or another, or the weight is patched.
        """
        amax = None if self.plan is None else self.plan.layers[layer].amax
        original = None if amax is None else self._read(f"{layer}.weight")
        if original is None or original.shape != weight.shape:
            return None
        original = original.to(weight.device)
        data, scale = self.plan.number_format.quantize(original, amax)
        same = data.view(torch.uint8).equal(weight._qdata.view(torch.uint8))
        return original.to(weight.dtype) if same and scale.equal(weight.params.scale) else None

    def _read(self, name: str) -> torch.Tensor | None:
        try:
            if version_of(self._path) != self._version:
                return None
            entry = self._entries[name]
            data = torch.empty(entry.end - entry.start, dtype=torch.uint8)
            with open(self._path, "rb") as file:
                file.seek(entry.start)
                whole = file.readinto(data.numpy()) == data.numel()
            return data.view(_DTYPES[entry.dtype]).view(entry.shape) if whole else None
        except (OSError, KeyError):
            return None
