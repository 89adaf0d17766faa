"""What else goes on around a composed sampling, from seed 1,000 on (see compositions).

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.cli_args
import comfy.controlnet
import comfy.model_management as memory
import pytest
import torch

from harness.control import control_lora, controlnet, steered
from harness.inprocess import Conditioning

FOREIGN, PACKED = "foreign 16 bit", "foreign 8 bit"
"""Models by another extension's loader."""

SHARES = "Control-LoRA"
"""The one that takes the model's own weights, by their names."""

_CONTROLS = {"ControlNet": controlnet, SHARES: control_lora}


def controlled(prompt: Conditioning, kind: str) -> Conditioning:
    """Return a prompt with one of CONTROLS."""
    return steered(prompt, comfy.controlnet.load_controlnet_state_dict(_CONTROLS[kind]()))


CONTROLS = tuple(_CONTROLS)
TURNS = {"stock": None, "FP8": "quantize uniformly"}
"""How another checkpoint is loaded, with which a sampling takes turns: by the stock loader, or by
ours with this `without_statistics`."""

_ROOM = 6 << 20  # bytes for weights: a third of the toy in 16 bit


def _no_vram(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory, "vram_state", memory.VRAMState.NO_VRAM)
    _a_cpu_has_memory_of_its_own(patch)


def _low_vram(patch: pytest.MonkeyPatch) -> None:
    def free(_: object = None, torch_free_too: bool = False) -> int | tuple[int, int]:
        left = int(memory.minimum_inference_memory()) + _ROOM
        return (left, left) if torch_free_too else left

    patch.setattr(memory, "vram_state", memory.VRAMState.LOW_VRAM)
    patch.setattr(memory, "get_free_memory", free)
    _a_cpu_has_memory_of_its_own(patch)


def _a_cpu_has_memory_of_its_own(patch: pytest.MonkeyPatch) -> None:
    """Let a CPU that stands in for a GPU be one for ComfyUI, which asks no CPU for its memory."""
    if memory.get_torch_device().type == "cpu":
        patch.setattr(memory, "is_device_cpu", lambda _: False)


def _fast(patch: pytest.MonkeyPatch) -> None:
    features = set(comfy.cli_args.PerformanceFeature)
    patch.setattr(comfy.cli_args.args, "fast", features)


def _patches_in_fp16(patch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    patch.setitem(memory.LORA_COMPUTE_DTYPES, torch.device("cpu"), torch.float16)


STREAMING = {"novram": _no_vram, "lowvram": _low_vram}
STARTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **STREAMING,
    "fast": _fast,
    "patches in FP16": _patches_in_fp16,
}
"""How ComfyUI was started, or on what device."""
