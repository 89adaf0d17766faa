"""SDXL's gated feed-forwards with less memory traffic between their two matrix products."""

from __future__ import annotations

import comfy.ops
import torch
from comfy.ldm.modules import attention

from ...quant.fp8 import gated_input
from .layout import hold
from .matmul import scale_at_hand


class FeedForward(attention.FeedForward):
    """ComfyUI's FeedForward with GEGLU as one kernel launch.

    If the next layer multiplies in FP8, that launch writes FP8.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what ComfyUI's own forward returns, up to rounding."""
        if not self._may_gate_at_once() or not inputs.numel():
            return super().forward(inputs)
        gate, _, last = self.net
        values = gate.proj(inputs)
        shape = *values.shape[:-1], values.shape[-1] // 2
        rows = values.reshape(-1, values.shape[-1]).contiguous()
        scale = scale_at_hand(last, values) if _is_untouched(last) else None
        gated = gated_input(rows, scale).view(shape)
        return last(gated if scale is None else hold(gated, scale, values.dtype))

    def _may_gate_at_once(self) -> bool:
        """Whether no gradients are needed, no compiler traces this, and nobody changed a part."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if type(self.net) is not torch.nn.Sequential or not _is_untouched(self.net):
            return False
        gate, dropout, _ = self.net
        kinds = type(gate), type(dropout)
        return (
            kinds == (attention.GEGLU, torch.nn.Dropout)
            and _is_untouched(gate)
            and _is_untouched(dropout)
        )


def _is_untouched(module: torch.nn.Module) -> bool:
    """Whether a module has no hooks and its own forward, which bypass LoRAs replace."""
    own = getattr(module.forward, "__func__", None) is type(module).forward
    return own and not (module._forward_hooks or module._forward_pre_hooks)


def gate_at_once(network: torch.nn.Module) -> None:
    """Give the feed-forwards of SDXL's and SD1.5's kind our class, which gates in one launch.

    Args:
        network: diffusion model whose Linear layers are ours; its parameters stay the same.
    """
    if not _gates_as_here():
        return
    for module in network.modules():
        if type(module) is attention.FeedForward and type(module.net[0]) is attention.GEGLU:
            module.__class__ = FeedForward


def _gates_as_here() -> bool:
    """Whether ComfyUI's GEGLU computes what gated_input does: extensions may have changed it."""
    gate = attention.GEGLU(1, 1, operations=comfy.ops.disable_weight_init)
    gate.proj = torch.nn.Identity()
    values = torch.linspace(-3, 3, 8)[None]
    return torch.allclose(gate(values), gated_input(values))
