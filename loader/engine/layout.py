"""How a quantized weight is held: ComfyUI's QuantizedTensor with HSWQ's own layout.

ComfyUI's memory modes, LoRA functions and savers know QuantizedTensor; the layout tells them how
to get a float weight out of it, how to put one back, and what to write to a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import comfy.float
import comfy.quant_ops
import torch
from comfy.quant_ops import TensorCoreFP8E4M3Layout, register_layout_class

from ...quant import FP8_MAX, Clipping, Plan, dequantize, quantize
from .int8_layout import HSWQINT8Layout
from .transfer import is_up_from_pageable, moved, transfer_of

LAYOUT, INT8_LAYOUT = "HSWQFP8Layout", "HSWQINT8Layout"
_ROUNDED_TO_MAX = 464.0  # halfway to 480, the next value if the grid went on: rounds to 448


class HSWQFP8Layout(TensorCoreFP8E4M3Layout):
    """FP8 e4m3fn with one FP32 weight_scale, for weights of any rank.

    Unlike ComfyUI's layout, it keeps the clipping that the search chose when a patch is applied.
    """

    @dataclasses.dataclass(frozen=True)
    class Params(TensorCoreFP8E4M3Layout.Params):
        """ComfyUI's parameters, and the scale of the input of a Linear that multiplies in FP8.

        The scale is held with the weight so that ComfyUI moves both together, in all memory modes.

        Attributes:
            input_scale: FP32 scalar tensor; None if the input is not quantized (see matmul).
        """

        input_scale: torch.Tensor | None = None

        def _tensor_fields(self) -> list[str]:
            return ["scale"] if self.input_scale is None else ["scale", "input_scale"]

    @classmethod
    def largest(cls, weight: torch.Tensor) -> torch.Tensor:
        """Return the largest magnitude of the weights that share a scale: here of all."""
        return weight.abs().amax()

    @classmethod
    def refitted(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor,
        original: torch.Tensor,
        plan: Plan,
        layer: str,
    ) -> tuple[torch.Tensor, torch.Tensor, Clipping]:
        """Return a patched original weight, the weight_scale to quantize it with, and its clipping.

        The same share is clipped as by the Plan, and the grid is no finer. So a weight that ComfyUI
        converts without a patch (small layers under Dynamic VRAM) keeps an FP16 file's bytes.

        Args:
            weight: the original with a patch.
            scale: FP32 weight_scale before the patch.
            original: `largest` of the original weight.
            plan: by which the weight was quantized.
            layer: its name.
        """
        scale = scale.to(original.device)
        share = (plan.layers[layer].amax / original.double()).clamp(max=1.0)
        limit = cls.largest(weight) * share
        if not plan.number_format.scaled:
            return weight.clamp(-limit, limit), scale, Clipping(limit)
        scale = torch.maximum(scale, scale_for(limit, scale))
        return weight, scale, Clipping(scale * FP8_MAX)

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        scale: torch.Tensor | str | None = None,
        clipping_scale: torch.Tensor | None = None,
        stochastic_rounding: int = 0,
        inplace_ops: bool = False,
        input_scale: torch.Tensor | None = None,
    ) -> tuple:
        """Quantize a float weight; the name and arguments are ComfyUI's.

        Args:
            tensor: float weight.
            scale: FP32 weight_scale to use; None or "recalculate" chooses one.
            clipping_scale: the weight_scale before a patch. The chosen scale is that times a power
                of 2: the grid that the search chose remains, and no more values are clipped.
            stochastic_rounding: seed; 0 rounds to the nearest.
            inplace_ops: allows overwriting `tensor`, which is never needed here.
            input_scale: the input_scale before a patch, kept: a patch does not change the input.
        """
        if scale is None or isinstance(scale, str):
            scale = scale_for(tensor.abs().amax(), clipping_scale)
        if stochastic_rounding:
            values = (tensor.to(torch.float32) / scale).clamp_(-FP8_MAX, FP8_MAX)
            data = comfy.float.stochastic_rounding(
                values, torch.float8_e4m3fn, seed=stochastic_rounding
            )
        else:
            data, _ = quantize(tensor, scale * FP8_MAX, scaled=True)
        input_scale = None if input_scale is None else input_scale.to(tensor.device, copy=True)
        return data, cls.Params(scale, tensor.dtype, tuple(tensor.shape), input_scale)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: object) -> torch.Tensor:
        """Return the float weight in the dtype that the tensor stands for."""
        return dequantize(qdata, params.scale, params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict:
        """Return the scales to keep through a patch (ComfyUI asks for LoRA under Dynamic VRAM)."""
        params = qtensor.params
        return {"clipping_scale": params.scale, "input_scale": params.input_scale}

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: object) -> dict[str, torch.Tensor]:
        """Return the float weight to save: stock ComfyUI cannot read a scaled Conv2d.

        A user who wants an FP8 file exports one.
        """
        return {"": cls.dequantize(qdata, params)}


def scale_for(amax: torch.Tensor, clipping_scale: torch.Tensor | None) -> torch.Tensor:
    """Return an FP32 weight_scale that clips no value up to `amax`.

    Args:
        amax: scalar tensor.
        clipping_scale: FP32 weight_scale before a patch; the result is that times a power of 2.
    """
    amax = amax.to(torch.float32)
    if clipping_scale is None:
        return torch.where(amax > 0, amax / FP8_MAX, 1.0)
    clipping_scale = clipping_scale.to(amax.device)
    octaves = torch.ceil(torch.log2(amax / (clipping_scale * _ROUNDED_TO_MAX)))
    return torch.where(amax > 0, clipping_scale * torch.exp2(octaves), clipping_scale)


register_layout_class(LAYOUT, HSWQFP8Layout)
register_layout_class(INT8_LAYOUT, HSWQINT8Layout)


class QuantizedTensor(comfy.quant_ops.QuantizedTensor):
    """ComfyUI's QuantizedTensor, made safe to use inside and outside of inference mode.

    Nodes run in inference mode, but unloading on `/free` does not. If a tensor was made in one
    mode and is detached in the other, torch refuses to share its version counter. Parameters,
    state dicts and `.data` all detach. The class has the same name as ComfyUI's because ComfyUI
    pins memory by that name.
    """

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func.overloadpacket is torch.ops.aten.to:
            # In inference mode `.to` arrives as one operation. comfy_kitchen's handlers for it
            # ignore `copy`, so that a backup would be the weight itself, or they dequantize. They
            # are right for the operations that `.to` is made of.
            return func.decompose(*args, **(kwargs or {}))
        if func in _ON_ANOTHER_DEVICE:
            device = (kwargs or {}).get("device", args[0].device)
            if device != args[0].device:
                return _ON_ANOTHER_DEVICE[func](args[0], torch.device(device), kwargs.get("dtype"))
        if func is torch.ops.aten.copy_.default:
            # comfy_kitchen's handler expects two quantized tensors.
            target, source, *rest = args
            if not isinstance(target, comfy.quant_ops.QuantizedTensor):
                return func(target, source.dequantize(), *rest, **(kwargs or {}))
            source = _like(target, source)
            is_alike = source._layout_cls == target._layout_cls  # else comfy_kitchen raises
            if is_alike and is_up_from_pageable(source._qdata, target.device):
                transfer_of(target.device).fill(target._qdata, source._qdata)
                # What is left to copy are the scales.
                source = source._copy_with(qdata=target._qdata, clone_params=False)
            args = (target, source, *rest)
        if func.is_view:
            # torch wants a view to be made in the mode in which its base was made.
            with torch.inference_mode(args[0].is_inference()), torch.no_grad():
                return super().__torch_dispatch__(func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def detach(self) -> QuantizedTensor:
        """Return a tensor that shares this one's bytes and scale."""
        with torch.inference_mode(self.is_inference()):
            return type(self)(self._qdata.detach(), self._layout_cls, self._params)

    @property
    def data(self) -> QuantizedTensor:
        """This tensor with bytes and scale shared: copying into it, as hooks do, sets both."""
        return self.detach()

    def __deepcopy__(self, memo: dict) -> QuantizedTensor:
        """Copy bytes and scale. torch's own way fails, since this tensor has no storage."""
        with torch.inference_mode(self.is_inference()), torch.no_grad():
            copied = self.clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Save the float weight (torch.save), which every torch reads without our code."""
        return self.dequantize().__reduce_ex__(protocol)

    def contiguous(
        self, memory_format: torch.memory_format = torch.contiguous_format
    ) -> torch.Tensor:
        """Return the float weight: a caller that asks for this reads memory next, to save it."""
        return self.dequantize().contiguous(memory_format=memory_format)

    def _copy_with(
        self, qdata: torch.Tensor | None = None, params: object = None, clone_params: bool = True
    ) -> QuantizedTensor:
        copied = super()._copy_with(qdata, params, clone_params)
        return type(self)(copied._qdata, copied._layout_cls, copied._params)


def _moved(
    tensor: comfy.quant_ops.QuantizedTensor, device: torch.device, dtype: torch.dtype | None = None
) -> comfy.quant_ops.QuantizedTensor:
    """Return a tensor's copy on another device."""
    return with_parts(tensor, lambda part: moved(part, device), dtype)


def _room_for(
    tensor: comfy.quant_ops.QuantizedTensor, device: torch.device, dtype: torch.dtype | None = None
) -> comfy.quant_ops.QuantizedTensor:
    """Return a tensor on a device, into which a tensor can be copied.

    ComfyUI makes one for each layer that it streams. comfy_kitchen's handler copies the scales, and
    waits for that copy, and so for all that the GPU has yet to do in that stream.
    """
    return with_parts(tensor, lambda part: torch.empty_like(part, device=device), dtype)


_ON_ANOTHER_DEVICE = {
    torch.ops.aten._to_copy.default: _moved,
    torch.ops.aten.empty_like.default: _room_for,
}
"""Operations for which comfy_kitchen's handlers take the slow way."""


def with_parts(
    tensor: comfy.quant_ops.QuantizedTensor,
    change: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype | None = None,
) -> comfy.quant_ops.QuantizedTensor:
    """Return a tensor whose bytes and scales are what a function makes of this one's.

    It stands for `dtype`; None keeps the tensor's.
    """
    before = tensor._params
    scales = {name: change(getattr(before, name)) for name in before._tensor_fields()}
    params = dataclasses.replace(before, orig_dtype=dtype or before.orig_dtype, **scales)
    return type(tensor)(change(tensor._qdata), tensor._layout_cls, params)


def _like(
    target: comfy.quant_ops.QuantizedTensor, source: torch.Tensor
) -> comfy.quant_ops.QuantizedTensor:
    """Quantize float values in the format of `target`: ComfyUI restores hooked weights so."""
    if isinstance(source, comfy.quant_ops.QuantizedTensor):
        return source
    values = source.to(target.device)
    return target.requantize_from_float(values, scale="recalculate").to(target.dtype)


def hold(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """Wrap stored bytes and their FP32 scale as a weight of `dtype` that ComfyUI can handle.

    Args:
        data: float8_e4m3fn or int8, of the weight's shape.
        scale: its weight_scale: a scalar tensor, for int8 (out, 1).
        dtype: of the weight.
    """
    shape = tuple(data.shape)
    if data.dtype is torch.int8:
        return QuantizedTensor(data, INT8_LAYOUT, HSWQINT8Layout.Params(scale, dtype, shape))
    return QuantizedTensor(data, LAYOUT, HSWQFP8Layout.Params(scale, dtype, shape))
