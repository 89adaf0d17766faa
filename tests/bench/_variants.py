"""The ways to quantize a checkpoint that are compared with one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

import comfy.sd
import common
import torch
from comfy.model_patcher import ModelPatcher
from hswq.calibration import Statistics, monitored_layers
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint
from hswq.quant import LayerPlan, Plan, Planner

STOCK = "stock FP8 cast"
KEEP_RATIOS = (0.0, 0.1, 0.25, 0.5)
ENDS = ("input_blocks.0.0", "out.2")
"""First and last convolution: they have few parameters, and all of a picture goes through them."""


def variants(
    checkpoint: str, reference: ModelPatcher, measured: Statistics
) -> dict[str, Callable[[], ModelPatcher]]:
    """Return what loads each variant, by its name.

    Args:
        checkpoint: 16-bit file.
        reference: its model in 16 bit.
        measured: statistics of it.
    """
    made = {STOCK: lambda: _stock_cast(checkpoint)}
    for keep_ratio in KEEP_RATIOS:
        made[f"absmax, keep {keep_ratio:g}"] = lambda keep=keep_ratio: _absmax(
            checkpoint, reference, measured, keep
        )
    for mode, scaled in (("compatible", False), ("scaled", True)):
        for keep_ratio in KEEP_RATIOS:
            made[f"HSWQ {mode}, keep {keep_ratio:g}"] = lambda keep=keep_ratio, scaled=scaled: (
                _load(checkpoint, common.planner(measured, keep, scaled))
            )
    made["scaled, first and last conv 16 bit"] = lambda: _ends_kept(checkpoint, measured)
    return made


def _load(checkpoint: str, source) -> ModelPatcher:
    return load_checkpoint(checkpoint, source, only_model=True)[0]


def _stock_cast(checkpoint: str) -> ModelPatcher:
    """Load as weight_dtype fp8_e4m3fn of ComfyUI's own loader does: all weights, biases, norms."""
    return comfy.sd.load_checkpoint_guess_config(
        checkpoint,
        output_vae=False,
        output_clip=False,
        model_options={"dtype": torch.float8_e4m3fn},
    )[0]


def _absmax(
    checkpoint: str, reference: ModelPatcher, measured: Statistics, keep_ratio: float
) -> ModelPatcher:
    """Scale every layer by its largest weight, as scaled FP8 files mostly are; nothing searched."""
    weights = monitored_layers(reference.model.diffusion_model)

    def largest(layer: LayerPlan) -> LayerPlan:
        amax = weights[layer.name].weight.abs().max().item()
        return dataclasses.replace(layer, amax=amax) if layer.quantized else layer

    return _changed(checkpoint, common.planner(measured, keep_ratio), largest)


def _ends_kept(checkpoint: str, measured: Statistics) -> ModelPatcher:
    """Keep no layer but the first and the last: not what HSWQ chooses, but what it might."""

    def keep(layer: LayerPlan) -> LayerPlan:
        kept = {"amax": None, "relative_error": None}
        return dataclasses.replace(layer, **kept) if layer.name in ENDS else layer

    return _changed(checkpoint, common.planner(measured, 0.0), keep)


def _changed(
    checkpoint: str, planner: Planner, change: Callable[[LayerPlan], LayerPlan]
) -> ModelPatcher:
    """Load by a Plan whose layers are changed after the search."""
    plan: Plan = _load(checkpoint, planner).get_attachment(ATTACHMENT)
    layers = {name: change(layer) for name, layer in plan.layers.items()}
    return _load(checkpoint, dataclasses.replace(plan, layers=MappingProxyType(layers)))
