"""ControlNets for the toy SDXL, begun as real ones are: as a copy of its way down.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import nodes
import torch
from comfy.controlnet import ControlBase
from torch import Tensor
from toy.shapes import CHANNELS

from harness.inprocess import Conditioning
from harness.patches import RANK, unet

File = dict[str, Tensor]

SHARED = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
HINT = (16, 16, 32, 32, 96, 96, 256, CHANNELS)  # channels of the picture's way in
HALVED = (2, 4, 6)  # of these convolutions
CONTROL = 0.3
LORA = 0.1  # of a layer's weights
OUTPUTS = (32, 32, 32, 32, 64, 64, 64, 128, 128)  # channels of the input blocks


def _new_layers() -> File:
    """Return what a ControlNet has beside its copy of the UNet; trained, so not zero."""
    numbers = torch.Generator().manual_seed(5)

    def conv(outputs: int, inputs: int, size: int) -> Tensor:
        weight = torch.randn(outputs, inputs, size, size, generator=numbers)
        return weight / weight[0].numel() ** 0.5

    tensors, channels = {}, 3
    for number, outputs in enumerate(HINT):
        tensors[f"input_hint_block.{2 * number}.weight"] = conv(outputs, channels, 3)
        tensors[f"input_hint_block.{2 * number}.bias"] = torch.zeros(outputs)
        channels = outputs
    for number, outputs in enumerate(OUTPUTS):
        tensors[f"zero_convs.{number}.0.weight"] = CONTROL * conv(outputs, outputs, 1)
        tensors[f"zero_convs.{number}.0.bias"] = torch.zeros(outputs)
    tensors["middle_block_out.0.weight"] = CONTROL * conv(OUTPUTS[-1], OUTPUTS[-1], 1)
    tensors["middle_block_out.0.bias"] = torch.zeros(OUTPUTS[-1])
    return tensors


def _copied() -> File:
    return {key: value for key, value in unet().items() if key.startswith(SHARED)}


def controlnet() -> File:
    """Return a whole ControlNet."""
    return {**_copied(), **_new_layers()}


def difference_controlnet() -> File:
    """Return one that holds only what it has changed of the UNet; it needs a model to load."""
    changed = {key: torch.zeros_like(value) for key, value in _copied().items()}
    tensors = {f"control_model.{key}": value for key, value in {**changed, **_new_layers()}.items()}
    return {**tensors, "difference": torch.zeros(1)}


def control_lora() -> File:
    """Return one that takes the model's own weights and adds low-rank changes."""
    numbers = torch.Generator().manual_seed(6)
    tensors = {"lora_controlnet": torch.zeros(0), **_new_layers()}
    for key, value in _copied().items():
        if value.ndim == 1:
            continue
        name, columns = key.removesuffix(".weight"), value[0].numel()
        size = LORA * value.std() / RANK**0.5
        tensors[f"{name}.up"] = torch.randn(value.shape[0], RANK, generator=numbers)
        tensors[f"{name}.down"] = torch.randn(RANK, columns, generator=numbers) * size
    return tensors


def steered(prompt: Conditioning, control: ControlBase) -> Conditioning:
    """Return a prompt with a ControlNet and its picture, as the node makes it."""
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3))
    node = nodes.ControlNetApplyAdvanced()
    return node.apply_controlnet(prompt, [], control, picture, 1.0, 0.0, 1.0)[0]
