"""The checkpoint whose pictures are compared, and prompts that its model knows."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy import model_detection, supported_models
from safetensors.torch import load_file, save_file
from toy import drawing
from toy.checkpoint import UNET_PREFIX, checkpoint_tensors
from toy.nodes.toy_sdxl import TrainedToySDXL

SUBJECTS = (
    "a lighthouse on a cliff in a storm, oil painting",
    "portrait of an old fisherman, soft window light",
    "a red fox asleep in the snow",
    "a bowl of plums on a linen tablecloth, still life",
    "a street in Lisbon at night after rain",
    "an astronaut reading a newspaper in a diner",
    "isometric drawing of a tiny bakery",
    "macro photograph of a dragonfly on a reed",
)
"""Prompts for a full-size model."""


def with_toy_encoders(unet: str, path: Path) -> str:
    """Write a checkpoint in FP16 that ComfyUI recognises; return its path.

    Args:
        unet: file of a UNet's tensors alone. It has SDXL's blocks, in any size, and was trained on
            the toy's pictures, text encoders and VAE.
        path: to write.
    """
    tensors = checkpoint_tensors(0, load_file(unet))
    tensors = {name: value.half().contiguous() for name, value in tensors.items()}
    config = model_detection.detect_unet_config(tensors, UNET_PREFIX)
    differs = {key: config[key] for key in ("model_channels", "transformer_depth")}

    class OtherSize(TrainedToySDXL):
        unet_config = {**TrainedToySDXL.unet_config, **differs}  # noqa: RUF012

    supported_models.models.append(OtherSize)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return str(path)


def prompts(toy: bool) -> tuple[list[str], list[str]]:
    """Return prompts to compare and prompts to record, of which none is the same."""
    if not toy:
        return list(SUBJECTS[::2]), list(SUBJECTS[1::2])
    order = torch.randperm(len(drawing.SUBJECTS), generator=torch.Generator().manual_seed(0))
    known = [drawing.SUBJECTS[number].prompt for number in order.tolist()]
    return known[::2], known[1::2]
