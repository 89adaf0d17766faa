"""Selections: which layers keep their 16-bit weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import torch

from .reasons import Reason


class MeasuredLayer(Protocol):
    """What a selection and a search need of one layer's statistics. LayerStatistics provides it."""

    @property
    def sensitivity(self) -> float:
        """Variance of the layer's output."""

    @property
    def importance(self) -> torch.Tensor | None:
        """(in channels,) mean |x| of the layer's input."""


class Selection(Protocol):
    """A way to choose the layers that stay 16 bit, as a frozen value.

    Attributes:
        also_keep: names of layers that always stay 16 bit, measured or not.
    """

    also_keep: frozenset[str]

    def choose(self, layers: Mapping[str, MeasuredLayer]) -> dict[str, Reason]:
        """Return why each measured layer is kept or quantized.

        Args:
            layers: by name, in the model's order.
        """


@dataclasses.dataclass(frozen=True)
class BySensitivity:
    """HSWQ's own selection: it keeps the layers whose outputs vary most.

    Attributes:
        keep_ratio: share of the measured layers that stay 16 bit, 0 to 1.
        also_keep: names of further layers that stay 16 bit, measured or not.
    """

    keep_ratio: float = 0.25
    also_keep: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        number = isinstance(self.keep_ratio, (int, float)) and not isinstance(self.keep_ratio, bool)
        if not number or not 0 <= self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be a number from 0 to 1, got {self.keep_ratio!r}")

    def choose(self, layers: Mapping[str, MeasuredLayer]) -> dict[str, Reason]:
        """Keep the `int(N * keep_ratio)` most sensitive of the N layers.

        Among layers of equal sensitivity, those that come first are kept. A layer whose statistics
        are not finite is kept too, and is not one of the N.
        """
        finite = {name: layer.sensitivity for name, layer in layers.items() if is_finite(layer)}
        ranked = sorted(finite, key=lambda name: -finite[name])  # stable: equal ones stay in order
        sensitive = set(ranked[: int(len(ranked) * self.keep_ratio)])
        return {name: self._reason(name, finite, sensitive) for name in layers}

    def _reason(self, name: str, finite: Mapping[str, float], sensitive: set[str]) -> Reason:
        if name in self.also_keep:
            return Reason.KEPT_BY_NAME
        if name not in finite:
            return Reason.KEPT_NOT_FINITE
        return Reason.KEPT_SENSITIVE if name in sensitive else Reason.QUANTIZED


DEFAULT_SELECTION = BySensitivity()


def is_finite(measured: MeasuredLayer) -> bool:
    """Whether a layer's sensitivity and every channel's importance are finite numbers."""
    importance = measured.importance
    return math.isfinite(measured.sensitivity) and (
        importance is None or bool(importance.isfinite().all())
    )
