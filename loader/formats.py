"""How FP8 layers lie in files: the original's V1 and V2, and ComfyUI's own format."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from .modelfile import ModelFileError

STORED_DTYPE = torch.float8_e4m3fn

_SCALE_KEYS = ("weight_scale", "scale", "weight.scale", "scale_weight")
"""ComfyUI's, the original's V2, a variant of it, and ComfyUI's before comfy_quant."""

_IGNORED_KEYS = ("comfy_quant", "input_scale", "scale_input")
"""Markers and activation scales: weights are used in the activations' dtype here."""

EXTRA_KEYS = _SCALE_KEYS + _IGNORED_KEYS
MODEL_MARKERS = ("scaled_fp8",)


def stored_scale(state_dict: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """Return the FP32 scalar weight_scale of a layer that is stored in FP8; 1 where it has none.

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
        raise ModelFileError(f"{name} has a weight_scale that is not one positive number")
    return scales[0].to(torch.float32, copy=True).reshape(())


def _format(name: str, marker: torch.Tensor) -> object:
    try:
        return json.loads(marker.numpy().tobytes()).get("format")
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelFileError(f"{name} has a damaged comfy_quant marker: {error}") from None
