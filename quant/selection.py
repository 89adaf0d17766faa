"""Selections: which layers keep their 16-bit weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import torch

from .reasons import Reason


class MeasuredLayer(Protocol):
    """What a selection and a search read of one layer's statistics (LayerStatistics has it)."""

    @property
    def sensitivity(self) -> float:
        """Variance of the layer's output."""

    @property
    def importance(self) -> torch.Tensor | None:
        """(in channels,) mean |x| of the layer's input."""


class Selection(Protocol):
    """A way to choose the layers that stay 16 bit, as a frozen value.

    Attributes:
        also_keep: names of layers that stay 16 bit in any case, measured or not.
    """

    also_keep: frozenset[str]

    def choose(self, layers: Mapping[str, MeasuredLayer]) -> dict[str, Reason]:
        """Return the reason of each measured layer; they come in the model's order."""


@dataclasses.dataclass(frozen=True)
class BySensitivity:
    """HSWQ's own selection: the layers whose outputs vary most (HSWQ.md, "Layer selection").

    Attributes:
        keep_ratio: share of the measured layers that stay 16 bit, 0 to 1.
        also_keep: names of layers that stay 16 bit beside them, measured or not.
    """

    keep_ratio: float = 0.25
    also_keep: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        number = isinstance(self.keep_ratio, (int, float)) and not isinstance(self.keep_ratio, bool)
        if not number or not 0 <= self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be a number from 0 to 1, got {self.keep_ratio!r}")

    def choose(self, layers: Mapping[str, MeasuredLayer]) -> dict[str, Reason]:
        """Keep the first `int(N * keep_ratio)` of the N layers by sensitivity, highest first.

        Layers of equal sensitivity stay in the mapping's order. A layer whose statistics are not
        finite is kept, and does not count.
        """
        ranked = sorted(
            (name for name, layer in layers.items() if is_finite(layer)),
            key=lambda name: -layers[name].sensitivity,  # a stable sort
        )
        sensitive = set(ranked[: int(len(ranked) * self.keep_ratio)])
        return {name: self._reason(name, layer, sensitive) for name, layer in layers.items()}

    def _reason(self, name: str, layer: MeasuredLayer, sensitive: set[str]) -> Reason:
        if name in self.also_keep:
            return Reason.KEPT_BY_NAME
        if not is_finite(layer):
            return Reason.KEPT_NOT_FINITE
        return Reason.KEPT_SENSITIVE if name in sensitive else Reason.QUANTIZED


DEFAULT_SELECTION = BySensitivity()


def is_finite(measured: MeasuredLayer) -> bool:
    """Whether a layer's sensitivity and every channel's importance are finite numbers."""
    importance = measured.importance
    return math.isfinite(measured.sensitivity) and (
        importance is None or bool(importance.isfinite().all())
    )
