"""How an INT8 weight with a scale a row is held; see layout for what ComfyUI does with it.

ComfyUI's own TensorWiseINT8Layout is not used: it has no convolutions, and multiplies in INT8 by
rounding each layer's input, which is a loss that nobody asked for.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, TensorCoreFP8E4M3Layout

from ...quant import INT8_MAX, Clipping, Plan, dequantize, int8

_SLACK = 1.0001  # by which a largest weight may grow that is rounded twice


class HSWQINT8Layout(QuantizedLayout):
    """INT8 with an FP32 weight_scale (out, 1), for weights of any rank, that keeps its clipping."""

    @dataclasses.dataclass(frozen=True)
    class Params(TensorCoreFP8E4M3Layout.Params):
        """ComfyUI's own: scale, orig_dtype, orig_shape.

        Attributes:
            multiplies: whether a Linear's product is in INT8 (see int8_matmul).
        """

        multiplies: bool = False
        input_scale: ClassVar[None] = None

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        scale: torch.Tensor | str | None = None,
        clipping_scale: torch.Tensor | None = None,
        stochastic_rounding: int = 0,
        inplace_ops: bool = False,
        multiplies: bool = False,
    ) -> tuple:
        """Quantize a float weight; the name and arguments are ComfyUI's.

        Args:
            tensor: float weight (out, in, ...).
            scale: FP32 weight_scale to use; None or "recalculate" chooses one.
            clipping_scale: the weight_scale before a patch. A row whose weights have about the
                size that they had keeps it.
            stochastic_rounding: seed; 0 rounds to the nearest.
            inplace_ops: allows overwriting `tensor`, which is never needed here.
            multiplies: see Params.
        """
        if scale is None or isinstance(scale, str):
            scale = _scale_for(cls.largest(tensor), clipping_scale)
        scale = scale.to(tensor.device)
        data = int8.with_scale(tensor, scale, stochastic_rounding)
        return data, cls.Params(scale, tensor.dtype, tuple(tensor.shape), multiplies)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """Return the float weight in the dtype that the tensor stands for."""
        return dequantize(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bytes and the weight_scale."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict:
        """Return what a patch leaves as it is (ComfyUI asks for LoRA under Dynamic VRAM)."""
        params = qtensor.params
        return {"clipping_scale": params.scale, "multiplies": params.multiplies}

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """Return the float weight to save: stock ComfyUI cannot read an INT8 Conv2d.

        A user who wants an INT8 file exports one.
        """
        return {"": cls.dequantize(qdata, params)}

    @classmethod
    def largest(cls, weight: torch.Tensor) -> torch.Tensor:
        """Return the largest magnitude of the weights that share a scale: (out, 1), each row's."""
        return weight.flatten(1).abs().amax(1, keepdim=True).to(torch.float32)

    @classmethod
    def refitted(
        cls, weight: torch.Tensor, scale: torch.Tensor, original: torch.Tensor, _: Plan, __: str
    ) -> tuple[torch.Tensor, torch.Tensor, Clipping]:
        """Return a patched original weight, the weight_scale to quantize it with, and its clipping.

        As much of each row is clipped as of the original's row, on no finer grid. See
        HSWQFP8Layout.refitted for the arguments.
        """
        scale = scale.to(original.device)
        clip = scale * INT8_MAX
        limit = cls.largest(weight) * torch.where(original > clip, clip / original, 1.0)
        scale = torch.where(limit > clip * _SLACK, limit / INT8_MAX, scale)
        return weight, scale, Clipping(limit.amax(), row_scale=scale)


def _scale_for(largest: torch.Tensor, clipping_scale: torch.Tensor | None) -> torch.Tensor:
    """Return an FP32 weight_scale (out, 1) that clips nothing.

    Args:
        largest: (out, 1), each row's largest magnitude.
        clipping_scale: (out, 1) FP32 weight_scale before a patch. A row keeps its own if that
            clips nothing and the row uses more than half of the range, or is all zeros.
    """
    scale = torch.where(largest > 0, largest / INT8_MAX, 1.0)
    if clipping_scale is None:
        return scale
    before = clipping_scale.to(scale.device)
    fits = (largest <= before * INT8_MAX * _SLACK) & (largest > before * INT8_MAX / 2)
    return torch.where(fits | (largest == 0), before, scale)
