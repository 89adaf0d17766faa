"""Whether quantized weights are as near to what ComfyUI computes in 16 bit as FP8 can be.

Nothing here is a tolerance of ours: what a value may be off by is its distance to the next one in
FP8, and the rounding of 16-bit arithmetic. On a GPU ComfyUI computes patches in FP16, on a CPU in
FP32. Import it where ComfyUI is up.
"""

from __future__ import annotations

import itertools

import comfy.lora
import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.identity import identity
from hswq.quant import FP8_MAX, Plan
from torch import Tensor

from harness.inprocess import distance, load, parts, unload, weight

_NEXT_AFTER_MAX = 480  # if e4m3fn had it: what is nearer to it than to 448 counts as clipped
_SMALLEST_EXPONENT, _MANTISSA_BITS = -6, 3
_FP16_STEP = 2.0**-24  # between FP16's smallest numbers, however small the value is
_ROUNDINGS = 4  # of a patch in 16-bit arithmetic: DoRA multiplies, adds, takes a norm and divides
_LOG_STEP = 2.0**-9  # what ComfyUI's random rounding may take a value for larger by, of the value


def assert_weights(
    model: ModelPatcher,
    before: ModelPatcher,
    expected: ModelPatcher,
    *,
    converted: bool,
    exact: bool,
) -> None:
    """Check every layer's weight, without a MODEL's patches and with them.

    Args:
        model: to look at.
        before: what it was quantized from, in 16 bit.
        expected: what it is to be, in 16 bit.
        converted: whether patches go onto its FP8 weights, as after the converter. The loaders'
            go onto the file's.
        exact: whether kept weights are equal to the bit; else within what the coarser dtype holds.
    """
    plan = model.get_attachment(ATTACHMENT)
    names = identity(before).layers
    source, right = _loaded(before, names), _loaded(expected, names)
    unload()
    plain = {} if plan is None else {name: _Held.of(model, name) for name in plan.quantized}
    load(model)
    coarser = max(torch.finfo(one.model_dtype()).eps for one in (model, expected))
    in_16_bit = memory.lora_compute_dtype(model.load_device).itemsize == 2
    if in_16_bit:
        coarser *= _ROUNDINGS
    made = in_16_bit and bool(before.patches)
    for name in names:
        if name in plain:
            layer = _Layer(model, plan, name, source[name], plain[name], coarser)
            layer.check(right[name], converted=converted, made=made)
        else:
            off = distance(weight(model, name), right[name])
            assert off <= (0 if exact else coarser), f"{name} is kept, and off by {off:.2g}"


def _loaded(model: ModelPatcher, names: tuple[str, ...]) -> dict[str, Tensor]:
    load(model)
    return {name: weight(model, name) for name in names}


class _Held:
    """A quantized weight as it is at one moment: its values, FP32, and its scale."""

    def __init__(self, values: Tensor, scale: float) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, model: ModelPatcher, name: str) -> _Held:
        held_in = parts(model.model.diffusion_model.get_submodule(name).weight)
        assert len(held_in) == 2, f"{name} is not quantized"
        return cls(weight(model, name), held_in[1].item())


class _Layer:
    """A quantized layer of a loaded MODEL."""

    def __init__(
        self, model: ModelPatcher, plan: Plan, name: str, source: Tensor, plain: _Held, slack: float
    ) -> None:
        """Take the weight that it was quantized from, and what became of it without patches.

        `slack` is what 16-bit arithmetic may be off by, relative to a value.
        """
        self._name, self._source, self._plain, self._slack = name, source, plain, slack
        self._amax, self._scaled = plan.layers[name].amax, plan.number_format.scaled
        self._key = f"diffusion_model.{name}.weight"
        self._patches = model.patches.get(self._key, [])
        self._found = _Held.of(model, name)

    def check(self, right: Tensor, *, converted: bool, made: bool) -> None:
        """Check the weight, of which `right` is what it is to be in 16 bit.

        `made` is whether 16-bit arithmetic has patched what was quantized.
        """
        self._assert_near(self._plain, [self._source], self._amax, made=made)
        if not self._patches:
            same = self._found.values.equal(self._plain.values)
            assert same, f"{self._name} has changed without a patch"
            return
        way = self._patched(self._source)
        off = distance(way[-1], right)
        assert off <= 2 * self._slack, f"{self._name} has other patches: it is off by {off:.2g}"
        if converted:
            way = self._patched(self._plain.values)
            self._assert_near(self._found, way, way[-1].abs().amax().item(), at_random=True)
        else:
            share = min(1.0, self._amax / self._source.abs().amax().item())
            self._assert_near(self._found, way, share * way[-1].abs().amax().item())

    def _patched(self, values: Tensor) -> list[Tensor]:
        """Return a weight without patches, with one, and so on, as ComfyUI computes in FP32."""
        return [
            comfy.lora.calculate_weight(self._patches[:count], values.clone(), self._key)
            for count in range(len(self._patches) + 1)
        ]

    def _assert_near(
        self,
        held: _Held,
        way: list[Tensor],
        limit: float,
        *,
        at_random: bool = False,
        made: bool = False,
    ) -> None:
        """Check that values are within half of FP8's step, and that no more is clipped.

        Args:
            held: to look at.
            way: all that 16-bit arithmetic has rounded before; the last is what was quantized.
            limit: the largest value that must not be clipped.
            at_random: whether up to a whole step is right, as after stochastic rounding.
            made: whether 16-bit arithmetic has made what was quantized, of numbers as large as its
                others: a sum that is almost 0 has their rounding.
        """
        scale, exact = held.scale, way[-1]
        if self._scaled:
            largest = scale * (FP8_MAX + _NEXT_AFTER_MAX) / 2
            assert largest >= limit * (1 - self._slack), f"{self._name} is clipped at {largest:.2g}"
            limit = scale * FP8_MAX
        # ComfyUI's random rounding has the exponent from a logarithm in FP16. Just below a power of
        # 2 that is one too large, and in 0.4% of the cases it then rounds to 7/8 of that power.
        taken_for = exact.abs() * (1 + _LOG_STEP) if at_random else exact.abs()
        exponents = torch.frexp(taken_for / scale).exponent - 1
        step = torch.exp2(exponents.clamp(min=_SMALLEST_EXPONENT) - _MANTISSA_BITS) * scale
        off = (held.values - exact.clamp(-limit, limit)).abs()
        # A patch can bring larger numbers than the weights before it and after it.
        steps = [after - before for before, after in itertools.pairwise((self._source, *way))]
        size = sum(values.abs() for values in (self._source, *way, *steps))
        size += self._source.abs().mean() if made else 0
        allowed = (1.0 if at_random else 0.5) * step + self._slack * size + _FP16_STEP
        worst = (off - allowed).argmax()
        assert (off <= allowed).all(), (
            f"{self._name}: {held.values.flatten()[worst]:.4g} for {exact.flatten()[worst]:.4g}, "
            f"where FP8 has a value each {step.flatten()[worst]:.2g}; "
            f"{(off > allowed).sum()} of {off.numel()} are off"
        )
