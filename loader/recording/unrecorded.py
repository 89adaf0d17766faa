"""Samplings that are not recorded in the background."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

WRAPPER = "hswq.calibration"
"""Key of the calibration node's wrapper. A model with it is not recorded in the background too."""


def unrecorded(patcher: ModelPatcher) -> ModelPatcher:
    """Return a clone whose samplings are not recorded: those of a job that changes weights."""

    def sample(executor: Callable, *args, **kwargs) -> torch.Tensor:
        return executor(*args, **kwargs)

    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER, sample)
    return clone
