"""The 16-bit weights that quantized ones came from, read again when a patch goes onto them."""

from __future__ import annotations

import functools

import torch
from comfy.quant_ops import QuantizedTensor

from ...quant import Plan, quantize
from ..files.errors import ModelFileError
from ..files.safetensors import DTYPE_NAMES, TensorEntry, read_header

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Originals:
    """A model file's weights, layer by layer.

    A patched FP8 weight is rounded once more, which doubles the error and hides a weak LoRA. On
    the original, the result is that of quantizing the merged weights. Nothing of the file stays
    open or in memory.

    Attributes:
        plan: by which the weights were quantized, None while they are.
    """

    def __init__(self, path: str, prefix: str) -> None:
        """Take a safetensors file (of others nothing is found), and its layers' prefix."""
        self.plan: Plan | None = None
        self._path, self._prefix = path, prefix

    def of(self, layer: str, weight: QuantizedTensor) -> torch.Tensor | None:
        """Return what a quantized weight came from, on its device and in the dtype it stands for.

        None where that is not known: the file is gone or another, or the weight is patched.
        """
        amax = None if self.plan is None else self.plan.layers[layer].amax
        original = None if amax is None else self._read(f"{self._prefix}{layer}.weight")
        if original is None or original.shape != weight.shape:
            return None
        original = original.to(weight.device)
        data, scale = quantize(original, amax, scaled=self.plan.scaled)
        same = data.view(torch.uint8).equal(weight._qdata.view(torch.uint8))
        return original.to(weight.dtype) if same and scale.equal(weight.params.scale) else None

    @functools.cached_property
    def _entries(self) -> dict[str, TensorEntry]:
        return read_header(self._path)

    def _read(self, name: str) -> torch.Tensor | None:
        try:
            entry = self._entries[name]
            data = torch.empty(entry.end - entry.start, dtype=torch.uint8)
            with open(self._path, "rb") as file:
                file.seek(entry.start)
                whole = file.readinto(data.numpy()) == data.numel()
            return data.view(_DTYPES[entry.dtype]).view(entry.shape) if whole else None
        except (OSError, KeyError, ModelFileError):
            return None
