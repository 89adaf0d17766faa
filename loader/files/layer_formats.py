"""How quantized layers are stored in files: the original's V1 and V2, and ComfyUI's formats."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import torch

from ...quant import FP8_MAX, FP8_PLAIN, FP8_SCALED, INT8, NumberFormat
from .errors import ModelFileError
from .safetensors import TensorEntry

STORED = {torch.float8_e4m3fn: "float8_e4m3fn", torch.int8: "int8_tensorwise"}
"""ComfyUI's names of the formats that are read, by the weights' dtype."""

_SCALE_KEYS = ("weight_scale", "scale", "weight.scale", "scale_weight")
"""Keys of a layer's scale: ComfyUI's, the original's V2, a variant of it, and ComfyUI's old one."""

_INPUT_SCALE_KEYS = ("input_scale", "scale_input")
"""Keys of an input's scale, for products in FP8: ComfyUI's, and its old one."""

_LEAST_INPUT_AMAX = 1e-30
_MAX_MARKER_BYTES = 1 << 12  # ComfyUI's have some 70
_MAX_SHOWN = 60  # characters of what a file says

DTYPE_KEY = "hswq.dtype"
"""Key of a file's metadata: the dtype, by safetensors' name, of most weights before they were FP8.

The tensors that are left do not show it: most of them may have another dtype."""

EXTRA_KEYS = (*_SCALE_KEYS, *_INPUT_SCALE_KEYS, "comfy_quant")
MODEL_MARKERS = ("scaled_fp8",)

MARKERS = {
    dtype: json.dumps({"format": name, "full_precision_matrix_mult": True}).encode()
    for dtype, name in STORED.items()
}
"""Values of ComfyUI's comfy_quant. Without the flag, ComfyUI would round activations to FP8, with
scale 1 if there is no input_scale. With the flag, an input_scale does nothing in ComfyUI. It is
stored for loaders that multiply in FP8: ours on request, or a tool that removes the flag. In INT8,
ComfyUI 0.30 multiplies with the flag too."""

Beside = Mapping[str, "tuple[torch.dtype, tuple[int, ...]]"]
"""Tensors that are stored beside a quantized weight: dtype and shape by key."""

_COMFY, _ORIGINAL, _PLAIN = ("weight_scale", "comfy_quant"), ("scale",), ()
_ONLY_OURS = "HSWQ loaders only: ComfyUI's own load it without an error, and pictures are black"


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """A format in which files are written.

    Attributes:
        number_format: of the quantized layers.
        linear: keys beside the quantized weight of a Linear.
        conv: keys beside the quantized weight of a Conv2d; None keeps every Conv2d in 16 bit.
        short: name for file names.
        only_ours: True if stock ComfyUI loads the file without an error but makes black pictures:
            it has no scaled Conv2d, and does not look for the original's scales.
        inputs: whether an input_scale is written for a Linear whose largest input is known.
    """

    number_format: NumberFormat
    linear: tuple[str, ...]
    conv: tuple[str, ...] | None
    short: str
    inputs: bool = False
    only_ours: bool = False

    @property
    def readers(self) -> str:
        """Which loaders can read the format; a file says it in its metadata."""
        return _ONLY_OURS if self.only_ours else "ComfyUI's own loaders, and HSWQ's"

    def beside(self, weight: torch.Tensor, input_amax: float | None = None) -> Beside | None:
        """Return the tensors beside a layer's quantized weight; None if the layer stays 16 bit.

        Args:
            weight: of the layer.
            input_amax: largest |x| of its input; None if it is not known.
        """
        keys = self.conv if weight.ndim == 4 else self.linear
        if keys is None:
            return None
        if weight.ndim == 2 and self.inputs and input_scale(input_amax) is not None:
            keys = (*keys, "input_scale")
        shapes = {
            "weight_scale": self.number_format.scale_shape(weight.shape),
            "scale": (1,),
            "input_scale": (),
        }
        marker = {"comfy_quant": (torch.uint8, (len(MARKERS[self.number_format.dtype]),))}
        facts = marker | {key: (torch.float32, shape) for key, shape in shapes.items()}
        return {key: facts[key] for key in keys}


COMPATIBLE, SCALED = "compatible", "scaled"
# Stock ComfyUI reports a marker of a Conv2d as unexpected, and has no scaled Conv2d.
FILE_FORMATS = {
    COMPATIBLE: FileFormat(FP8_PLAIN, _COMFY, _PLAIN, "compatible"),
    SCALED: FileFormat(FP8_SCALED, _COMFY, None, "scaled", inputs=True),
    "scaled, convs too": FileFormat(
        FP8_SCALED, _COMFY, _COMFY, "scaled_convs_hswq_only", inputs=True, only_ours=True
    ),
    "int8": FileFormat(INT8, _COMFY, None, "int8"),
    "int8, convs too": FileFormat(INT8, _COMFY, _COMFY, "int8_convs_hswq_only", only_ours=True),
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
        if layer == name or entry.dtype not in ("F8_E4M3", "I8"):
            continue
        if f"{layer}.scale" in entries or f"{name}.scale" in entries:
            return "original V2"
        if len(entry.shape) == 4 and any(f"{layer}.{key}" in entries for key in _SCALE_KEYS):
            found = "int8, convs too" if entry.dtype == "I8" else "scaled, convs too"
    return found


def stored_scale(state_dict: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """Return the FP32 weight_scale of a layer that is stored in FP8 or INT8.

    For FP8 it is a scalar, 1 if the file has none. For INT8 it is (out, 1), also if the file has a
    single one for the layer.

    Args:
        state_dict: with the layer's keys.
        prefix: of the layer's keys, with its dot.

    Raises:
        ModelFileError: the layer is in a format that HSWQ does not know, or has no rows.
    """
    name = prefix.rstrip(".")
    weight = state_dict[f"{prefix}weight"]
    expected = STORED.get(weight.dtype)
    if expected is None:
        raise ModelFileError(f"{name} is stored as {weight.dtype}, not as float8_e4m3fn or int8")
    if not weight.ndim:
        raise ModelFileError(f"{name} is stored as a single number")
    marker = state_dict.get(f"{prefix}comfy_quant")
    if marker is not None:
        _check_format(name, expected, _read_marker(name, marker))
    scales = [state_dict[prefix + key] for key in _SCALE_KEYS if prefix + key in state_dict]
    if not scales:
        if weight.dtype is torch.int8:
            raise ModelFileError(f"{name} is stored as INT8 without a weight_scale")
        return torch.ones((), dtype=torch.float32)
    scale, rows = scales[0], len(weight) if weight.dtype is torch.int8 else 1
    fits = scale.is_floating_point() and scale.numel() in (1, rows)
    numbers = scale.to(torch.float32, copy=True) if fits else torch.zeros(1)
    if not ((numbers > 0) & numbers.isfinite()).all():
        wanted = "a single positive number" if rows == 1 else f"1 or {rows} positive numbers"
        raise ModelFileError(f"{name} has a weight_scale that is not {wanted}")
    if weight.dtype is torch.int8:
        return numbers.reshape(-1, 1).expand(rows, 1).contiguous()
    return numbers.reshape(())


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


def _check_format(name: str, expected: str, marker: Mapping) -> None:
    """Refuse a layer whose comfy_quant marker says another format than its dtype does."""
    kind = marker.get("format")
    if kind != expected:
        shown = repr(kind)[:_MAX_SHOWN]
        raise ModelFileError(f"{name} is stored in the format {shown}, not in {expected}")
    inner = marker.get("params")
    if any(isinstance(one, Mapping) and one.get("convrot") for one in (marker, inner)):
        raise ModelFileError(f"{name} is stored with rotated inputs (convrot), which HSWQ lacks")


def _read_marker(name: str, marker: torch.Tensor) -> Mapping:
    if marker.nbytes > _MAX_MARKER_BYTES:
        raise ModelFileError(f"{name} has a comfy_quant marker of {marker.nbytes} bytes")
    try:
        found = json.loads(marker.numpy().tobytes())
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{name} has a damaged comfy_quant marker: {error}") from None
    if not isinstance(found, Mapping):
        raise ModelFileError(f"{name} has a comfy_quant marker that is no object")
    return found
