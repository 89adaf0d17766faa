"""Linear and Conv2d that are quantized while ComfyUI loads them (its `custom_operations`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import comfy.float
import comfy.model_management as memory
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...quant import dequantize
from ...quant.fp8 import is_compiled_without_fp8
from ..files.layer_formats import EXTRA_KEYS, stored_input_amax, stored_scale
from .int8_matmul import multiplies_here
from .layout import hold, with_parts
from .matmul import multiplied
from .originals import Originals
from .transfer import is_up_from_pageable, moved

Decide = Callable[
    [str, torch.Tensor, torch.device], "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
]
"""Takes a layer's name, 16-bit weight and device; returns the weight to keep, or quantized bytes
and weight_scale.

Bytes and scale must be on the device where they are to stay. Copies must be complete before ComfyUI
moves the model, or computes with it.
"""


def _normal_tensors(method: Callable) -> Callable:
    """Run a method outside of inference mode, so that its tensors can be used in both modes.

    Nodes run in inference mode, but unloading (`/free`) and routes do not, and a parameter that
    was made in inference mode cannot be patched or moved outside of it.
    """

    @functools.wraps(method)
    def outside(*args, **kwargs) -> object:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return outside


def hswq_operations(
    decide: Decide, *, manual_cast: bool, originals: Originals | None = None
) -> SimpleNamespace:
    """Return ComfyUI operations for one load, whose Linear and Conv2d ask `decide`.

    Args:
        decide: is called once a layer, in the model's order.
        manual_cast: whether weights are cast to the input's dtype in each forward, as ComfyUI
            does if the device cannot compute in the weights' dtype.
        originals: reads the weights before quantizing, so that patches can be applied to them.
    """
    base = comfy.ops.manual_cast if manual_cast else comfy.ops.disable_weight_init

    class Linear(_Quantizable, base.Linear):
        _decide, _originals = staticmethod(decide), originals

        def _product(
            self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            outputs = multiplied(inputs, weight, bias)
            if outputs is not None:
                return outputs
            weight = _float_weight(weight, inputs.dtype)
            return torch.nn.functional.linear(inputs, weight, bias)

    class Conv2d(_Quantizable, base.Conv2d):
        _decide, _originals = staticmethod(decide), originals

        def _product(
            self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            return self._conv_forward(inputs, _float_weight(weight, inputs.dtype), bias)

    class Operations(base):
        pass

    Operations.Linear, Operations.Conv2d = Linear, Conv2d
    return Operations


class _Quantizable:
    """What Linear and Conv2d share: a weight that is 16 bit or a QuantizedTensor.

    Attributes:
        stored_input_amax: largest |x| of the input as a quantized file says it, else None.
    """

    stored_input_amax: float | None = None
    _name = ""
    # Between convert_weight and set_weight: amax of the original that the patch is applied to.
    _original_amax: torch.Tensor | None = None

    def __init__(
        self, *args, device: torch.device | None = None, dtype: torch.dtype | None = None, **kwargs
    ) -> None:
        # No memory is allocated here: the weights come from the file, one by one.
        super().__init__(*args, device="meta", dtype=dtype, **kwargs)
        self._shapes = {
            key: tuple(value.shape) for key, value in self._parameters.items() if value is not None
        }
        self._device = device or torch.device("cpu")
        self._dtype = dtype or torch.get_default_dtype()
        self.weight = self.bias = None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        for key, shape in self._shapes.items():
            value = state_dict.get(prefix + key)
            if value is None:
                missing.append(prefix + key)
                if key == "weight":  # stays None, by which check_whole refuses the file
                    continue
                value = torch.zeros(shape)  # a missing bias is reported above, and adds nothing
            elif tuple(value.shape) != shape:
                errors.append(f"{prefix}{key} has the shape {tuple(value.shape)}, not {shape}")
                continue
            elif key == "weight":
                value = self._weight(state_dict, prefix, assign)
            self._set(key, self._placed(value, assign))
        known = {prefix + key for key in (*self._shapes, *EXTRA_KEYS)}
        unexpected.extend(key for key in state_dict if key.startswith(prefix) and key not in known)

    @_normal_tensors
    def _weight(
        self, state_dict: dict[str, torch.Tensor], prefix: str, assign: bool
    ) -> torch.Tensor:
        value, self._name = state_dict[prefix + "weight"], prefix[:-1]
        if value.dtype.itemsize < 2:
            self.stored_input_amax = stored_input_amax(state_dict, prefix)
            data = value if assign else value.clone()
            return hold(data, stored_scale(state_dict, prefix), self._dtype)
        if self.weight is not None:
            return self._exchanged(value)
        decided = self._decide(self._name, value, self._device)
        if isinstance(decided, torch.Tensor):
            return decided
        return hold(*decided, self._dtype)

    def _exchanged(self, value: torch.Tensor) -> torch.Tensor:
        """Return a state dict's value for a weight that is loaded already, in the weight's format.

        The state dict of a model in memory holds QuantizedTensors, a saved one their float values.
        """
        old, value = self.weight, value.to(self.weight.device, copy=True)
        self._original_amax = None
        if not isinstance(old, QuantizedTensor):
            value = value.dequantize() if isinstance(value, QuantizedTensor) else value
            return value.to(old.dtype)
        if isinstance(value, QuantizedTensor):
            return value.to(old.dtype)
        again = old.requantize_from_float(value, scale=old._params.scale).to(old.dtype)
        if again.dequantize().equal(value.to(old.dtype)):
            return again  # the same values; other values need a new scale
        return self._requantized(old, value, seed=0).to(old.dtype)

    @_normal_tensors
    def _placed(self, value: torch.Tensor, assign: bool) -> torch.Tensor:
        if isinstance(value, QuantizedTensor):
            return value
        device = self._device if self.weight is None else self.weight.device
        if value.device.type != "cpu":  # a weight is where it is to be; the bias follows it
            value = value if self.weight is None else moved(value, device)
            return value.to(self._dtype)
        # Under Dynamic VRAM (assign), a tensor of the right dtype stays mapped from the file.
        return value.to(device, self._dtype, copy=not assign)

    @_normal_tensors
    def _set(self, key: str, value: torch.Tensor) -> None:
        # A parameter that shares an inference tensor's memory could not be changed later.
        value = value.clone() if value.is_inference() else value
        setattr(self, key, torch.nn.Parameter(value, requires_grad=False))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        comfy.ops.run_every_op()
        if self.comfy_cast_weights or self.weight_function or self.bias_function:
            return self.forward_comfy_cast_weights(inputs)
        return self._product(inputs, self.weight, self.bias)

    def forward_comfy_cast_weights(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute through ComfyUI's general path, for offloaded weights and weight functions."""
        if multiplies_here(self, inputs):
            return self._product(inputs, self.weight, self._cast_bias(inputs))
        if isinstance(self.weight, QuantizedTensor) and is_compiled_without_fp8():
            return self._product(inputs, self._decoded(inputs), self._cast_bias(inputs))
        if self._is_only_streamed(inputs):
            return self._streamed_product(inputs)
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, inputs, offloadable=True, compute_dtype=inputs.dtype
        )
        outputs = self._product(inputs, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return outputs

    def _is_only_streamed(self, inputs: torch.Tensor) -> bool:
        """Whether all that is to be done with the weight, before the product, is to copy it here.

        It is quantized then, on another device in memory that is pinned, and has no patches.
        """
        weight = self.weight
        if not isinstance(weight, QuantizedTensor) or weight.dtype != inputs.dtype:
            return False
        data, device = weight._qdata, inputs.device
        if data.device == device or is_up_from_pageable(data, device):
            return False
        has_more = self.weight_function or self.bias_function or hasattr(self, "_v")
        return not (has_more or torch.compiler.is_compiling())

    def _streamed_product(self, inputs: torch.Tensor) -> torch.Tensor:
        """Copy the weight by ComfyUI's streams, and compute with it.

        ComfyUI's `cast_bias_weight` gives the same, but takes the CPU longer. It calls a
        QuantizedTensor's operations, and each of them runs in Python.
        """
        device, bias = inputs.device, self.bias
        stream = memory.get_offload_stream(device)
        non_blocking = memory.device_supports_non_blocking(device)
        streamed = functools.partial(
            memory.cast_to, device=device, non_blocking=non_blocking, stream=stream
        )
        weight = with_parts(self.weight, streamed)
        bias = None if bias is None else streamed(bias)
        memory.sync_stream(device, stream)
        try:
            return self._product(inputs, weight, None if bias is None else bias.to(inputs.dtype))
        finally:  # the copies are memory of that stream, which may use it again after the product
            if stream is not None:
                stream.wait_stream(memory.current_stream(device))

    def _decoded(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the float weight with its functions, for compilers that refuse FP8 tensors."""
        weight = _float_weight(self.weight, inputs.dtype).to(inputs.device)
        for function in self.weight_function:
            weight = function(weight)
        return weight

    def _cast_bias(self, inputs: torch.Tensor) -> torch.Tensor | None:
        bias = self.bias
        if bias is None:
            return None
        bias = bias.to(inputs.device, inputs.dtype)
        for function in self.bias_function:
            bias = function(bias)
        return bias

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_) -> torch.Tensor:
        """Return the float weight for ComfyUI to patch: the original if it can be read again."""
        if not isinstance(weight, QuantizedTensor):
            return weight
        originals, original = self._originals, None
        if originals is not None and not (originals.is_sampled and _is_for_hooks(weight)):
            original = originals.of(self._name, weight)
        self._original_amax = None if original is None else weight.layout_cls.largest(original)
        return weight.dequantize() if original is None else original

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_,
    ) -> torch.Tensor | None:
        """Take a patched float weight, and hold it in the format of the one that it replaces."""
        old = self.weight
        if isinstance(old, QuantizedTensor):
            new = self._requantized(old, weight, seed or 0).to(old.dtype)
        else:
            new = comfy.float.stochastic_rounding(weight, old.dtype, seed=seed or 0)
        if return_weight:
            return new
        if inplace_update:
            old.data.copy_(new)
        else:
            self._set("weight", new)
        return None

    def _requantized(self, old: QuantizedTensor, weight: torch.Tensor, seed: int) -> torch.Tensor:
        amax, self._original_amax = self._original_amax, None
        if amax is None:
            return old.requantize_from_float(weight, scale="recalculate", stochastic_rounding=seed)
        # Rounding is to the nearest or compensated, not stochastic, because the original was not
        # rounded before.
        plan, scale = self._originals.plan, old.params.scale
        weight, scale, clipping = old.layout_cls.refitted(weight, scale, amax, plan, self._name)
        new = old.requantize_from_float(weight, scale=scale)
        data = self._originals.compensated(self._name, weight.to(old.dtype), clipping)
        if data is not None:
            new._qdata.copy_(data)
        return new

    @_normal_tensors
    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> torch.nn.Module:
        # torch moves parameters by exchanging their data, which fails for a tensor subclass.
        for key, value in self._parameters.items():
            if value is not None:
                self._set(key, _applied(fn, value))
        return self


def _applied(fn: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    """Return what a function for `Module._apply` makes of a parameter.

    Most such functions move it. It goes by pinned memory then.
    """
    if isinstance(value, QuantizedTensor) or value.is_meta:
        return fn(value)
    empty = fn(value.data.new_empty((0,) * value.ndim))
    if empty.device == value.device or empty.dtype != value.dtype:
        return fn(value)
    return moved(value.data, empty.device)


def _is_for_hooks(weight: torch.Tensor) -> bool:
    """Whether ComfyUI asks for a weight of a model in sampling in order to apply hooks' patches.

    Conditioning hooks change patches in every step, and reading the file would take seconds each
    time. ComfyUI does not say why it asks. But it asks in FP32 for hooks, and for LoRAs in the
    dtype in which the device computes them. (It also asks in FP32 for weights that are merged into
    another model; then the model they are from is not being sampled.)
    """
    computes = memory.lora_compute_dtype(weight.device)
    return weight.dtype is torch.float32 and computes is not torch.float32


def _float_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(weight, QuantizedTensor):
        return dequantize(weight._qdata, weight._params.scale, dtype)
    return weight
