"""A selection by effect: how the model's output changes if one layer alone is quantized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from .reasons import Reason
from .selection import MeasuredLayer, Selection, is_finite

LARGEST_EFFECT = 1e100
"""What an effect counts as that is larger, or not finite, so that sums of effects stay finite."""


@dataclasses.dataclass(frozen=True)
class ByEffect(Selection):
    """Keeps the layers whose quantization changes the output most for each byte that it saves.

    Attributes:
        budget: bytes that all kept layers may add to the quantized model; those of `also_keep` do
            not count.
        effects: by layer name, the effect of quantizing this layer alone: the square of the change
            of the model's output, over the square of that output. Only their order and proportions
            matter. A layer that is not named has no effect.
        costs: by layer name, the bytes that keeping it adds. A layer that is no larger in 16 bit
            costs 0 or less, such as one of INT8 with four inputs: it is kept.
        also_keep: names of further layers that stay 16 bit, measured or not.
    """

    budget: int
    effects: Mapping[str, float]
    costs: Mapping[str, int]
    also_keep: frozenset[str] = frozenset()
    reason: ClassVar[Reason] = Reason.KEPT_EFFECT

    def __post_init__(self) -> None:
        """Freeze the mappings.

        Raises:
            ValueError: the budget is below 0, or a layer with an effect has no cost.
        """
        if self.budget < 0:
            raise ValueError(f"the bytes for layers in 16 bit must be 0 or more, not {self.budget}")
        if not self.effects.keys() <= self.costs.keys():
            unknown = self.effects.keys() - self.costs.keys()
            raise ValueError(f"the effects are another model's: it has no layer {min(unknown)!r}")
        object.__setattr__(self, "effects", MappingProxyType(dict(self.effects)))
        object.__setattr__(self, "costs", MappingProxyType(dict(self.costs)))

    def ranked(self, layers: Mapping[str, MeasuredLayer]) -> list[str]:
        """Return the layers that have an effect, by effect a byte, the largest first."""
        worth = {
            name: self._worth(name)
            for name, layer in layers.items()
            if name not in self.also_keep and is_finite(layer)
        }
        some = [name for name in worth if worth[name] > 0]
        return sorted(some, key=worth.__getitem__, reverse=True)  # equal ones stay in order

    def kept(self, ranked: Sequence[str]) -> set[str]:
        """Return the first layers that fit into the budget, and later ones that still do."""
        left, kept, costs = self.budget, set(), self.costs
        for name in ranked:
            cost = costs[name]
            if cost <= left:
                kept.add(name)
                left -= cost
        return kept

    def _worth(self, name: str) -> float:
        """Return a layer's effect a byte."""
        if name not in self.effects:
            return 0.0
        cost = self.costs[name]
        return self.effects[name] / cost if cost > 0 else math.inf
