"""How FP8 layers are stored in files: the original's V1 and V2, and ComfyUI's own format."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import torch

from ...quant import FP8_MAX, FP8_PLAIN, FP8_SCALED, NumberFormat
from .errors import ModelFileError
from .safetensors import TensorEntry

STORED_DTYPE = torch.float8_e4m3fn

_SCALE_KEYS = ("weight_scale", "scale", "weight.scale", "scale_weight")
"""Keys of a layer's scale: ComfyUI's, the original's V2, a variant of it, and ComfyUI's old one."""

_INPUT_SCALE_KEYS = ("input_scale", "scale_input")
"""Keys of an input's scale, for products in FP8: ComfyUI's, and its old one."""

_LEAST_INPUT_AMAX = 1e-30

DTYPE_KEY = "hswq.dtype"
"""Key of a file's metadata: the dtype, by safetensors' name, of most weights before they were FP8.

The tensors that are left do not show it: most of them may have another dtype."""

EXTRA_KEYS = (*_SCALE_KEYS, *_INPUT_SCALE_KEYS, "comfy_quant")
MODEL_MARKERS = ("scaled_fp8",)

MARKER = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
"""Value of ComfyUI's comfy_quant. Without the flag, ComfyUI would round activations to FP8, with
scale 1 if there is no input_scale. With the flag, an input_scale does nothing in ComfyUI. It is
stored for loaders that multiply in FP8: ours on request, or a tool that removes the flag."""

Beside = Mapping[str, "tuple[torch.dtype, tuple[int, ...]]"]
"""Tensors that are stored beside an FP8 weight: dtype and shape by key."""

_COMFY: Beside = {"weight_scale": (torch.float32, ()), "comfy_quant": (torch.uint8, (len(MARKER),))}
_ORIGINAL: Beside = {"scale": (torch.float32, (1,))}
_PLAIN: Beside = {}
_ONLY_OURS = "HSWQ loaders only: ComfyUI's own load it without an error, and pictures are black"


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """A format in which files are written.

    Attributes:
        number_format: of the quantized layers.
        linear: tensors beside the FP8 weight of a Linear.
        conv: tensors beside the FP8 weight of a Conv2d; None keeps every Conv2d in 16 bit.
        short: name for file names.
        only_ours: True if stock ComfyUI loads the file without an error but makes black pictures:
            it has no scaled Conv2d, and does not look for the original's scales.
        inputs: whether an input_scale is written for a Linear whose largest input is known.
    """

    number_format: NumberFormat
    linear: Beside
    conv: Beside | None
    short: str
    inputs: bool = False
    only_ours: bool = False

    @property
    def readers(self) -> str:
        """Which loaders can read the format; a file says it in its metadata."""
        return _ONLY_OURS if self.only_ours else "ComfyUI's own loaders, and HSWQ's"

    def beside(self, weight: torch.Tensor, input_amax: float | None = None) -> Beside | None:
        """Return the tensors beside a layer's FP8 weight; None if the layer stays 16 bit.

        Args:
            weight: of the layer.
            input_amax: largest |x| of its input; None if it is not known.
        """
        if weight.ndim == 4:
            return self.conv
        if self.inputs and input_scale(input_amax) is not None:
            return {**self.linear, "input_scale": (torch.float32, ())}
        return self.linear


COMPATIBLE, SCALED = "compatible", "scaled"
# Stock ComfyUI reports a marker of a Conv2d as unexpected, and has no scaled Conv2d.
FILE_FORMATS = {
    COMPATIBLE: FileFormat(FP8_PLAIN, _COMFY, _PLAIN, "compatible"),
    SCALED: FileFormat(FP8_SCALED, _COMFY, None, "scaled", inputs=True),
    "scaled, convs too": FileFormat(
        FP8_SCALED, _COMFY, _COMFY, "scaled_convs_hswq_only", inputs=True, only_ours=True
    ),
    "original V2": FileFormat(FP8_SCALED, _ORIGINAL, _ORIGINAL, "v2_hswq_only", only_ours=True),
}


def only_ours(entries: Mapping[str, TensorEntry]) -> str | None:
    """Return which of FILE_FORMATS a file is in that stock ComfyUI misreads, None where it is none.

    Args:
        entries: of the diffusion model's tensors.
    """
    found = None
    for name, entry in entries.items():
        layer = name.removesuffix(".weight")
        if layer == name or entry.dtype != "F8_E4M3":
            continue
        if f"{layer}.scale" in entries or f"{name}.scale" in entries:
            return "original V2"
        if len(entry.shape) == 4 and any(f"{layer}.{key}" in entries for key in _SCALE_KEYS):
            found = "scaled, convs too"
    return found


def stored_scale(state_dict: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """Return the FP32 scalar weight_scale of a layer that is stored in FP8; 1 if it has none.

    Args:
        state_dict: with the layer's keys.
        prefix: of the layer's keys, with its dot.

    Raises:
        ModelFileError: the layer is in a format that HSWQ does not know.
    """
    name = prefix.rstrip(".")
    weight = state_dict[f"{prefix}weight"]
    if weight.dtype is not STORED_DTYPE:
        raise ModelFileError(f"{name} is stored as {weight.dtype}, not as {STORED_DTYPE}")
    marker = state_dict.get(f"{prefix}comfy_quant")
    kind = _format(name, marker) if marker is not None else "float8_e4m3fn"
    if kind != "float8_e4m3fn":
        raise ModelFileError(f"{name} is stored in the format {kind!r}, not in float8_e4m3fn")
    scales = [state_dict[prefix + key] for key in _SCALE_KEYS if prefix + key in state_dict]
    if not scales:
        return torch.ones((), dtype=torch.float32)
    if scales[0].numel() != 1 or not 0 < scales[0].float().item() < float("inf"):
        raise ModelFileError(f"{name} has a weight_scale that is not a single positive number")
    return scales[0].to(torch.float32, copy=True).reshape(())


def input_scale(amax: float | None) -> torch.Tensor | None:
    """Return the FP32 scalar input_scale of a layer whose largest |x| is `amax`.

    None if that is not known, or so small that its reciprocal would overflow.
    """
    if amax is None or amax < _LEAST_INPUT_AMAX:
        return None
    return torch.tensor(amax / FP8_MAX, dtype=torch.float32)


def stored_input_amax(state_dict: Mapping[str, torch.Tensor], prefix: str) -> float | None:
    """Return the largest |x| of a stored layer's input by its input_scale; None if it has none.

    A scale that is not a positive number counts as missing, since only products in FP8 need it.
    """
    for key in _INPUT_SCALE_KEYS:
        scale = state_dict.get(prefix + key)
        if scale is not None and scale.numel() == 1 and 0 < scale.float().item() < math.inf:
            return scale.float().item() * FP8_MAX
    return None


def _format(name: str, marker: torch.Tensor) -> object:
    try:
        return json.loads(marker.numpy().tobytes()).get("format")
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelFileError(f"{name} has a damaged comfy_quant marker: {error}") from None
