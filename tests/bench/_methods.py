"""Ways to round a model's weights, each in several draws of its rounding's chance."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from hswq.calibration import Statistics, monitored_layers
from hswq.quant import (
    BySensitivity,
    Reason,
    dequantize,
    optimal_amax,
    output_error,
    quantize,
    quantize_compensated,
)

JITTER = 0.02  # of amax, up and down: it changes which way every weight is rounded
ENDS = ("input_blocks.0.0", "out.2")


class Method(NamedTuple):
    """A way to round.

    Attributes:
        amax: "search" for HSWQ's, "largest" for the largest weight's, None for a plain cast.
        keep_ratio: share of the layers in 16 bit, by HSWQ's sensitivity.
        ends: whether the first and last projection are in 16 bit as well.
        compensated: whether rounding is compensated from sketches.
    """

    amax: str | None = "search"
    keep_ratio: float = 0.0
    ends: bool = False
    compensated: bool = False


METHODS = {
    "cast": Method(amax=None),
    "absmax": Method("largest"),
    "absmax, ends kept": Method("largest", ends=True),
    "HSWQ V2, keep 0": Method(),
    "HSWQ V2, keep 0.25": Method(keep_ratio=0.25),
    "HSWQ V2, ends kept": Method(ends=True),
    "compensated, keep 0": Method(compensated=True),
    "compensated, ends kept": Method(ends=True, compensated=True),
    "compensated, keep 0.25 and ends": Method(keep_ratio=0.25, ends=True, compensated=True),
}


class Rounder:
    """Puts rounded weights into a 16-bit model, which then samples as fast as ever."""

    def __init__(
        self,
        model: torch.nn.Module,
        statistics: Statistics,
        sketches: Mapping[str, torch.Tensor],
    ) -> None:
        """Search every layer's amax once."""
        self._layers, self._statistics, self._sketches = (
            monitored_layers(model), statistics, sketches,
        )  # fmt: skip
        self._amax = {"search": {}, "largest": {}}
        for name, layer in self._layers.items():
            importance = statistics[name].importance
            self._amax["search"][name] = optimal_amax(layer.weight, importance, scaled=True)
            self._amax["largest"][name] = layer.weight.abs().max().item()

    def kept(self, method: Method) -> frozenset[str]:
        """Return the layers that stay in 16 bit."""
        selection = BySensitivity(method.keep_ratio, frozenset(ENDS if method.ends else ()))
        reasons = selection.choose(self._statistics).items()
        return frozenset(name for name, reason in reasons if reason is not Reason.QUANTIZED)

    def bytes_kept(self, method: Method) -> float:
        """Return what the kept layers add to the FP8 bytes of all, as a share of them."""
        sizes = {name: layer.weight.numel() for name, layer in self._layers.items()}
        return sum(sizes[name] for name in self.kept(method)) / sum(sizes.values())

    @contextlib.contextmanager
    def rounded(self, method: Method, draw: int) -> Iterator[float]:
        """Round all weights in a block; give the mean output error that the sketches expect."""
        numbers, kept, errors, before = random.Random(draw), self.kept(method), [], {}
        try:
            for name, layer in self._layers.items():
                jitter = numbers.uniform(1 - JITTER, 1 + JITTER)
                if name in kept:
                    continue
                before[name] = layer.weight.data.clone()
                found = self._round(name, method, jitter)
                errors.append(output_error(layer.weight, *found, self._sketches[name]))
                layer.weight.data.copy_(dequantize(*found, layer.weight.dtype))
            yield sum(errors) / len(errors)
        finally:
            for name, weight in before.items():
                self._layers[name].weight.data.copy_(weight)

    def _round(self, name: str, method: Method, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self._layers[name].weight.detach()
        if method.amax is None:
            return quantize(weight, 448.0, scaled=False)
        amax = self._amax[method.amax][name] * jitter
        if not method.compensated:
            return quantize(weight, amax, scaled=True)
        return quantize_compensated(weight, amax, self._sketches[name], scaled=True)
