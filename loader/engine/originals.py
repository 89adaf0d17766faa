"""The 16-bit weights before quantizing, read again from the file when a patch is applied."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from comfy.model_base import BaseModel
from comfy.quant_ops import QuantizedTensor

from ...quant import Clipping, Plan
from ..files.errors import ModelFileError
from ..files.fingerprints import fingerprint
from ..files.model_file import ModelFile
from ..files.safetensors import DTYPES, is_safetensors
from ..files.versions import version_of
from ..host import settings
from .transfer import transfer_of


class Originals:
    """A model file's weights, read layer by layer.

    Patching the FP8 weight would round it a second time, which doubles the error and hides a weak
    LoRA. Patching the original gives the same result as quantizing the merged weights. The file is
    neither kept open nor in memory.

    Attributes:
        plan: by which the weights were quantized; None until loading is complete.
        sketches: by which they were rounded, None where they were rounded to the nearest.
        is_sampled: whether their model is in a sampling.
    """

    def __init__(self, file: ModelFile) -> None:
        """Take a model file. Weights are found only in a safetensors file."""
        self.plan: Plan | None = None
        self.sketches: Mapping[str, torch.Tensor] | None = None
        self._model: weakref.ref[BaseModel] | None = None
        self._path, self._version = file.path, file.version
        self._fingerprint = fingerprint(file) if is_safetensors(file.path) else None
        self._noted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._entries = file.own if is_safetensors(file.path) else {}

    def belong_to(
        self, model: BaseModel, plan: Plan, sketches: Mapping[str, torch.Tensor] | None
    ) -> None:
        """Note which model was made from these weights, by which Plan and which sketches."""
        self._model, self.plan, self.sketches = weakref.ref(model), plan, sketches

    @property
    def is_sampled(self) -> bool:
        model = None if self._model is None else self._model()
        # ComfyUI sets this before a sampling, and resets it after, also after an error.
        return getattr(model, "current_patcher", None) is not None

    def note(self, layer: str, data: torch.Tensor, scale: torch.Tensor) -> None:
        """Note a layer's bytes and scale, by which `of` sees whether the weight was patched."""
        self._noted[layer] = _checksum(data), scale.clone()

    def of(self, layer: str, weight: QuantizedTensor) -> torch.Tensor | None:
        """Return the original of a quantized weight, on its device and in the dtype it stands for.

        None if it cannot be had: the file is gone or has changed, or the weight is patched.
        """
        noted = None if self.plan is None else self._noted.get(layer)
        if noted is None:
            return None
        # A patch that doubles a weight changes nothing but its scale.
        held = _checksum(weight._qdata), weight._params.scale
        if not all(map(_equal, held, noted)):
            return None
        original = self._read(f"{layer}.weight", weight.device)
        if original is None or original.shape != weight.shape:
            return None
        return original.to(weight.dtype)

    def compensated(
        self, layer: str, weight: torch.Tensor, clipping: Clipping
    ) -> torch.Tensor | None:
        """Return a patched weight's quantized bytes, rounded by the sketch of its layer's inputs.

        None if rounding is to be to the nearest: there is no sketch, or the user wants it so. In
        the dtype that the weight stands for, an unpatched one gets the bytes that it had.
        """
        wanted = self.sketches is not None and settings.current().compensate_loras
        sketch = self.sketches.get(layer) if wanted else None
        if sketch is None:
            return None
        return self.plan.number_format.quantize(weight, clipping, sketch)[0]

    def _is_still_there(self) -> bool:
        """Whether the file still holds the same weights. It may have been moved away and back."""
        version = version_of(self._path)
        if version != self._version and fingerprint(self._path) == self._fingerprint:
            self._version = version
        return version == self._version

    def _read(self, name: str, device: torch.device) -> torch.Tensor | None:
        try:
            if not self._is_still_there():
                return None
            entry = self._entries[name]
            with open(self._path, "rb", buffering=0) as file:
                file.seek(entry.start)
                data = transfer_of(device).read(file, entry.end - entry.start)
            return data.view(DTYPES[entry.dtype]).view(entry.shape)
        except (OSError, KeyError, ModelFileError):
            return None


def _checksum(data: torch.Tensor) -> torch.Tensor:
    """Return a checksum of a tensor's bytes, an int64 scalar that is equal on all devices.

    Each 8 bytes count with an odd factor of their own. So every changed bit shows, and almost every
    exchange. A factor is the sum of one of the row and one of the column: a CPU adds up rows and
    columns ten times as fast as it multiplies each number.
    """
    words = data.detach().view(torch.uint8).flatten(1).contiguous()
    if words.shape[1] % 8 == 0:
        words = (words.clone() if words.storage_offset() % 8 else words).view(torch.int64)
    rows, columns = words.shape
    odd = torch.arange(1, 2 * rows, 2, device=words.device)
    even = torch.arange(0, 2 * rows * columns, 2 * rows, device=words.device)
    by_row, by_column = words.sum(1, dtype=torch.int64), words.sum(0, dtype=torch.int64)
    return (by_row * odd).sum() + (by_column * even).sum()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, on whatever devices they are."""
    return a.cpu().equal(b.cpu())
