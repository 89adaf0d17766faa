"""A small LoRA for the toy SDXL."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from toy.shapes import unet_shapes

RANK = 2
STRENGTH = 0.3  # of a layer's weights, so that the picture changes clearly


def make_lora(path: Path) -> Path:
    """Write a LoRA on every layer of the UNet, named as kohya's trainer does.

    With every layer in it, it is on quantized and on kept ones, on Linear and on Conv2d.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in unet_shapes():
        if len(shape) == 1:
            continue
        outputs, inputs, *kernel = shape
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up = torch.randn(outputs, RANK, *[1] * len(kernel), generator=generator)
        down = torch.randn(RANK, inputs, *kernel, generator=generator)
        tensors[f"{layer}.lora_up.weight"] = up
        tensors[f"{layer}.lora_down.weight"] = down * STRENGTH / down[0].numel() ** 0.5 / RANK
        tensors[f"{layer}.alpha"] = torch.tensor(float(RANK))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path
