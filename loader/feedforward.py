"""SDXL's gated feed-forwards with one pass over memory between their matrix products, not three."""

from __future__ import annotations

import torch
from comfy.ldm.modules import attention

from ..quant.fp8 import gated_input
from .layout import hold
from .matmul import scale_at_hand


class FeedForward(attention.FeedForward):
    """ComfyUI's, whose GEGLU is one launch and gives FP8 to a layer that multiplies in it."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what ComfyUI's own forward does, but for a last digit here and there."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not inputs.numel():
            return super().forward(inputs)  # which torch can derive, or fuses itself
        gate, _, last = self.net
        values = gate.proj(inputs)
        shape = *values.shape[:-1], values.shape[-1] // 2
        scale = scale_at_hand(last, values)
        gated = gated_input(values.flatten(0, -2), scale).view(shape)
        return last(gated if scale is None else hold(gated, scale, values.dtype))


def gate_at_once(network: torch.nn.Module) -> None:
    """Let a diffusion model's feed-forwards gate in one launch, those of SDXL's and SD1.5's kind.

    Args:
        network: whose Linear layers are ours; it has the same parameters afterwards.
    """
    for module in network.modules():
        if type(module) is attention.FeedForward and type(module.net[0]) is attention.GEGLU:
            module.__class__ = FeedForward
