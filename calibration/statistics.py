"""Statistics are sums, so those of many runs, processes and machines add up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch

from .noise_levels import NOISE_LEVELS, merged_levels


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Dual Monitor sums of one layer (HSWQ.md, "Dual Monitor").

    Attributes:
        output_sum: of the calls' mean(Y).
        output_square_sum: of the calls' mean(Y^2).
        output_calls: number of calls in both.
        importance_sum: (in channels,) float64 CPU tensor, sum of the calls' mean |X|.
        input_calls: number of calls in it.
        input_amax: largest |X| of all calls, what FP8 activations are scaled by; None where it was
            not recorded (other tools do not).
    """

    output_sum: float
    output_square_sum: float
    output_calls: int
    importance_sum: torch.Tensor
    input_calls: int
    input_amax: float | None = None

    @property
    def sensitivity(self) -> float:
        """Variance of the output over all calls, never below 0; nan if a sum is not finite."""
        mean = self.output_sum / self.output_calls
        variance = self.output_square_sum / self.output_calls - mean * mean
        return max(0.0, variance) if math.isfinite(variance) else math.nan

    @property
    def importance(self) -> torch.Tensor:
        """(in channels,) float64: mean |x| of every input channel over all calls."""
        return self.importance_sum / self.input_calls

    @property
    def calls(self) -> int:
        """How many forwards of the layer were measured."""
        return self.output_calls

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        numbers = (self.output_sum, self.output_square_sum, self.input_amax or 0.0)
        return all(map(math.isfinite, numbers)) and bool(self.importance_sum.isfinite().all())

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """Return the sums of both, and the larger of what both know of the largest |X|.

        Raises:
            ValueError: they have different numbers of input channels.
        """
        if self.importance_sum.shape != other.importance_sum.shape:
            raise ValueError(
                f"cannot add statistics of {other.importance_sum.numel()} input channels "
                f"to statistics of {self.importance_sum.numel()}"
            )
        return LayerStatistics(
            self.output_sum + other.output_sum,
            self.output_square_sum + other.output_square_sum,
            self.output_calls + other.output_calls,
            self.importance_sum + other.importance_sum,
            self.input_calls + other.input_calls,
            _larger(self.input_amax, other.input_amax),
        )


def _larger(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return one if one > other or math.isnan(one) else other  # nan, if either is


class Statistics(Mapping[str, LayerStatistics]):
    """Statistics of one diffusion model: layer name (relative to it) to LayerStatistics.

    Attributes:
        meta: what else is known, JSON-like. `samples`: latent images measured, `total_steps`:
            forwards of the model measured, `fingerprint`: of the model's weights.
    """

    def __init__(
        self, layers: Mapping[str, LayerStatistics] | None = None, meta: Mapping | None = None
    ) -> None:
        """Take the layers (in the model's order) and meta; neither is changed later."""
        self._layers = MappingProxyType(dict(layers or {}))
        self.meta = MappingProxyType(dict(meta or {}))

    def __getitem__(self, name: str) -> LayerStatistics:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Statistics({len(self)} layers, {self.samples} samples)"

    @property
    def samples(self) -> int:
        """Latent images measured; 0 if the file that these came from does not say."""
        return self.meta.get("samples", 0)

    @property
    def fingerprint(self) -> str | None:
        """Of the weights that were measured; None if unknown."""
        return self.meta.get("fingerprint")

    def merge(self, other: Statistics) -> Statistics:
        """Return the sums of both; this one's meta wins, counts add up.

        Raises:
            ValueError: they belong to different weights, or a layer has other input channels.
        """
        if None not in (self.fingerprint, other.fingerprint) and (
            self.fingerprint != other.fingerprint
        ):
            raise ValueError(
                f"cannot add statistics of the model {other.fingerprint} "
                f"to statistics of the model {self.fingerprint}"
            )
        layers = dict(self)
        for name, layer in other.items():
            try:
                layers[name] = layers[name].merge(layer) if name in layers else layer
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        counts = {
            key: self.meta.get(key, 0) + other.meta.get(key, 0)
            for key in ("samples", "total_steps")
        }
        meta = {**other.meta, **self.meta, **counts}
        meta.pop(NOISE_LEVELS, None)
        # Sums of nothing, which merging begins with, have seen no level and hide none.
        parts = [part.meta for part in (self, other) if part]
        meta |= merged_levels(parts)
        if self.fingerprint is None and other.fingerprint is not None:
            meta["fingerprint"] = other.fingerprint  # also where this one's says None
        return Statistics(layers, meta)
