"""A selection by effect: how the model's output changes if one layer alone is quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from .reasons import Reason
from .selection import MeasuredLayer, is_finite


@dataclasses.dataclass(frozen=True)
class ByEffect:
    """Keeps the layers whose quantization changes the output most for each byte that it saves.

    Attributes:
        budget: bytes that all kept layers may add to the quantized model; those of `also_keep` do
            not count.
        effects: by layer name, the effect of quantizing this layer alone: the square of the change
            of the model's output, over the square of that output. Only their order and proportions
            matter. A layer that is not named has no effect.
        costs: by layer name, the bytes that keeping it adds, above 0.
        also_keep: names of further layers that stay 16 bit, measured or not.
    """

    budget: int
    effects: Mapping[str, float]
    costs: Mapping[str, int]
    also_keep: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Freeze the mappings.

        Raises:
            ValueError: the budget is below 0, or a layer with an effect has no cost.
        """
        if self.budget < 0:
            raise ValueError(f"the bytes for layers in 16 bit must be 0 or more, not {self.budget}")
        unknown = self.effects.keys() - self.costs.keys()
        if unknown:
            raise ValueError(f"the effects are another model's: it has no layer {min(unknown)!r}")
        object.__setattr__(self, "effects", MappingProxyType(dict(self.effects)))
        object.__setattr__(self, "costs", MappingProxyType(dict(self.costs)))

    def choose(self, layers: Mapping[str, MeasuredLayer]) -> dict[str, Reason]:
        """Keep layers by effect a byte, the largest first, as long as they fit into the budget."""
        left, kept = self.budget, set()
        for name in sorted(layers, key=self._worth, reverse=True):  # equal ones stay in order
            cost = self.costs.get(name, 0)
            free = name in self.also_keep or not is_finite(layers[name])
            if not free and self._worth(name) > 0 and cost <= left:
                kept.add(name)
                left -= cost
        return {name: self._reason(name, layer, kept) for name, layer in layers.items()}

    def _worth(self, name: str) -> float:
        """Return a layer's effect a byte."""
        return self.effects[name] / self.costs[name] if name in self.effects else 0.0

    def _reason(self, name: str, layer: MeasuredLayer, kept: set[str]) -> Reason:
        if name in self.also_keep:
            return Reason.KEPT_BY_NAME
        if not is_finite(layer):
            return Reason.KEPT_NOT_FINITE
        return Reason.KEPT_EFFECT if name in kept else Reason.QUANTIZED
