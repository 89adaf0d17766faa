"""Selections: which layers keep their 16-bit weights."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

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


class Selection(abc.ABC):
    """A way to choose the layers that stay 16 bit, as a frozen value.

    Attributes:
        also_keep: names of layers that always stay 16 bit, measured or not.
        reason: why layers stay 16 bit that the selection chooses by itself.
    """

    also_keep: frozenset[str]
    reason: ClassVar[Reason]

    @abc.abstractmethod
    def ranked(self, layers: Mapping[str, MeasuredLayer]) -> list[str]:
        """Return the layers that it may keep, the first one first.

        They do not depend on how much it keeps: selections that differ in nothing else need to rank
        a model's layers only once.

        Args:
            layers: by name, in the model's order.
        """

    @abc.abstractmethod
    def kept(self, ranked: Sequence[str]) -> set[str]:
        """Return the layers that it keeps, of those that `ranked` returned."""

    def choose(self, layers: Mapping[str, MeasuredLayer]) -> dict[str, Reason]:
        """Return why each measured layer is kept or quantized.

        Args:
            layers: by name, in the model's order.
        """
        kept = self.kept(self.ranked(layers))
        return {name: self._reason(name, layer, kept) for name, layer in layers.items()}

    def _reason(self, name: str, layer: MeasuredLayer, kept: set[str]) -> Reason:
        if name in self.also_keep:
            return Reason.KEPT_BY_NAME
        if not is_finite(layer):
            return Reason.KEPT_NOT_FINITE
        return self.reason if name in kept else Reason.QUANTIZED


@dataclasses.dataclass(frozen=True)
class BySensitivity(Selection):
    """HSWQ's own selection: it keeps the layers whose outputs vary most.

    Attributes:
        keep_ratio: share of the measured layers that stay 16 bit, 0 to 1.
        also_keep: names of further layers that stay 16 bit, measured or not.
    """

    keep_ratio: float = 0.25
    also_keep: frozenset[str] = frozenset()
    reason: ClassVar[Reason] = Reason.KEPT_SENSITIVE

    def __post_init__(self) -> None:
        number = isinstance(self.keep_ratio, (int, float)) and not isinstance(self.keep_ratio, bool)
        if not number or not 0 <= self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be a number from 0 to 1, got {self.keep_ratio!r}")

    def ranked(self, layers: Mapping[str, MeasuredLayer]) -> list[str]:
        """Return the layers whose statistics are finite, the most sensitive first."""
        finite = {name: layer.sensitivity for name, layer in layers.items() if is_finite(layer)}
        return sorted(finite, key=lambda name: -finite[name])  # stable: equal ones stay in order

    def kept(self, ranked: Sequence[str]) -> set[str]:
        """Return the `int(N * keep_ratio)` most sensitive of the N layers."""
        return set(ranked[: int(len(ranked) * self.keep_ratio)])


DEFAULT_SELECTION = BySensitivity()


def is_finite(measured: MeasuredLayer) -> bool:
    """Whether a layer's sensitivity and every channel's importance are finite numbers."""
    importance = measured.importance
    return math.isfinite(measured.sensitivity) and (
        importance is None or bool(importance.isfinite().all())
    )
