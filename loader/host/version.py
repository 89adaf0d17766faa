"""Whether HSWQ works on this ComfyUI."""

from __future__ import annotations

import re

from . import selfcheck

OLDEST = "0.27.0"
"""The oldest ComfyUI on which the tests pass. pyproject.toml has the same number.

Older ones lack `QuantizedTensor.requantize_from_float`, with which ComfyUI applies LoRAs to
quantized weights under Dynamic VRAM, and `folder_paths.is_within_directory`.
"""


def problem() -> str | None:
    """Return a sentence that says why HSWQ cannot work here; None if it can.

    It imports nothing that an older ComfyUI lacks.
    """
    version = _version()
    if _numbers(version) < _numbers(OLDEST):
        return f"HSWQ needs ComfyUI {OLDEST} or newer, this is {version or 'an older one'}"
    missing = selfcheck.lacking(selfcheck.BASE)
    if missing:
        return f"HSWQ needs {selfcheck.listed(missing)}, which this ComfyUI lacks"
    import comfy.quant_ops

    if not hasattr(comfy.quant_ops.QuantizedTensor, "requantize_from_float"):
        return (
            "HSWQ needs the comfy-kitchen of ComfyUI's requirements.txt, which is missing or older"
        )
    return None


def _version() -> str:
    try:
        import comfyui_version

        return comfyui_version.__version__
    except (ImportError, AttributeError):
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers by which versions are compared: "0.30.0-dev1" is (0, 30, 0)."""
    return tuple(map(int, [*re.findall(r"\d+", version), 0, 0, 0][:3]))
