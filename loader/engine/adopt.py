"""Marking a ModelPatcher as quantized."""

from __future__ import annotations

import logging

import comfy.hooks
from comfy.model_patcher import ModelPatcher

from ...quant import Plan
from .alive import ATTACHMENT, note_alive
from .feedforward import gate_at_once
from .saving import save_as_16_bit
from .streaming import stream_large_layers


def adopt(patcher: ModelPatcher, plan: Plan, name: str, its_fingerprint: str | None) -> None:
    """Mark a patcher as quantized by a Plan, and say so in the log.

    Args:
        patcher: MODEL whose weights are quantized.
        plan: the Plan by which they were quantized.
        name: of the model, for the log and the panel.
        its_fingerprint: of the weights before quantizing; None if it is not known.
    """
    patcher.set_attachments(ATTACHMENT, plan)
    if its_fingerprint is not None:
        note_alive(patcher.model, name, its_fingerprint, plan)
    gate_at_once(patcher.model.diffusion_model)
    save_as_16_bit(patcher.model)
    stream_large_layers(patcher)
    # MinVram turns off ComfyUI's cache of hooked weights: it holds them in FP32, which takes four
    # times the memory of our weights.
    patcher.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
    for warning in plan.warnings:
        logging.warning("HSWQ: %s: %s", name, warning)
    logging.info(
        "HSWQ: %s: %d layers quantized to %s, %d kept in 16 bit, %.2f GiB of weights",
        name, len(plan.quantized), plan.number_format.title, len(plan.kept),
        patcher.model_size() / 2**30,
    )  # fmt: skip
