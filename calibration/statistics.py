"""Statistics are sums, so that those of many runs, processes and machines can be added up."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch

from .noise_levels import NOISE_LEVELS, merged_levels


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Dual Monitor sums of one layer (HSWQ.md, "Dual Monitor").

    Attributes:
        output_sum: sum of the calls' mean(Y).
        output_square_sum: sum of the calls' mean(Y^2).
        output_calls: number of calls in these two sums.
        importance_sum: (in channels,) float64 CPU tensor, sum of the calls' mean |X|.
        input_calls: number of calls in importance_sum.
        input_amax: largest |X| of all calls, by which FP8 inputs are scaled; None if it was not
            recorded (other tools do not).
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
        """Return the sums of both, and the larger of their largest |X|.

        Raises:
            ValueError: they have different numbers of input channels.
        """
        if self.importance_sum.shape != other.importance_sum.shape:
            raise ValueError(
                f"cannot add statistics of {other.importance_sum.numel()} input channels "
                f"to statistics of {self.importance_sum.numel()}"
            )
        importance = self.importance_sum
        if importance.numel():  # not of heads, of which there are many
            importance = importance + other.importance_sum
        return LayerStatistics(
            self.output_sum + other.output_sum,
            self.output_square_sum + other.output_square_sum,
            self.output_calls + other.output_calls,
            importance,
            self.input_calls + other.input_calls,
            _larger(self.input_amax, other.input_amax),
        )


def _larger(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return one if one > other or math.isnan(one) else other  # nan if either is nan


class Statistics(Mapping[str, LayerStatistics]):
    """Statistics of one diffusion model: maps layer name (relative to it) to LayerStatistics.

    Attributes:
        meta: further facts, as in JSON. `samples`: number of latent images that were measured;
            `total_steps`: number of forwards; `fingerprint`: of the model's weights.
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
        """Number of latent images that were measured; 0 if the file does not say."""
        return self.meta.get("samples", 0)

    @functools.cached_property
    def fewest_calls(self) -> int:
        """How often the least measured layer was measured; 0 without layers."""
        return min((layer.calls for layer in self.values()), default=0)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the weights that were measured; None if unknown."""
        return self.meta.get("fingerprint")

    def merge(self, other: Statistics) -> Statistics:
        """Return the sums of both. Counts in the meta add up; else this one's meta comes first.

        Raises:
            ValueError: they belong to different weights, or a layer has different numbers of input
                channels.
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
        # Merging begins with an empty sum, which says nothing of noise levels: leave it out.
        parts = [part.meta for part in (self, other) if part]
        meta |= merged_levels(parts)
        if self.fingerprint is None and other.fingerprint is not None:
            meta["fingerprint"] = other.fingerprint  # also if this one's meta has None
        return Statistics(layers, meta)
