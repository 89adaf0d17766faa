"""The Plan: what happens to every layer, and why. Nothing else decides anything about a layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from .fp8 import FP8_MAX
from .search import DEFAULT_SETTINGS, SearchSettings

KEPT_SENSITIVE = "kept: among the most sensitive layers"
KEPT_UNMEASURED = "kept: it has no statistics"
KEPT_NOT_FINITE = "kept: its statistics are not finite"
QUANTIZED = "quantized: less sensitive than the kept layers"
QUANTIZED_UNIFORM = "quantized without statistics: every channel counts alike"


class MeasuredLayer(Protocol):
    """What a Plan reads of one layer's statistics (calibration.LayerStatistics has it)."""

    @property
    def sensitivity(self) -> float:
        """Variance of the layer's output."""

    @property
    def importance(self) -> torch.Tensor | None:
        """(in channels,) mean |x| of the layer's input."""


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer's fate.

    Attributes:
        name: relative to the diffusion model.
        amax: clipping magnitude in the weight's units; None for a layer that keeps its weights.
        reason: a sentence for people.
        sensitivity: output variance, None where not measured.
        relative_error: weighted root mean square error over the weighted root mean square of the
            weights, of the quantized layer; None for a kept one.
        warnings: sentences about statistics that do not fit the weights.
        input_amax: largest |x| of the layer's input, None where not measured.
    """

    name: str
    amax: float | None
    reason: str
    sensitivity: float | None = None
    relative_error: float | None = None
    warnings: tuple[str, ...] = ()
    input_amax: float | None = None

    @property
    def quantized(self) -> bool:
        """Whether the layer becomes FP8."""
        return self.amax is not None

    def scale(self, scaled: bool) -> float:
        """Return the weight_scale: `amax / 448` for V2, 1 for V1 and for kept layers."""
        return self.amax / FP8_MAX if scaled and self.amax is not None else 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What quantizing one diffusion model with one set of statistics and settings does.

    Attributes:
        scaled: V2 (True) or V1.
        keep_ratio: share of the measured layers that keep their 16-bit weights.
        layers: every Linear and Conv2d of the model by name, in the model's order.
        settings: of the search.
        samples: latent images that the statistics come from, 0 where unknown.
    """

    scaled: bool
    keep_ratio: float
    layers: Mapping[str, LayerPlan]
    settings: SearchSettings = DEFAULT_SETTINGS
    samples: int = dataclasses.field(default=0, compare=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about statistics that do not fit the weights."""
        return tuple(warning for layer in self.layers.values() for warning in layer.warnings)

    @property
    def quantized(self) -> list[str]:
        """Names of the layers that become FP8."""
        return [name for name, layer in self.layers.items() if layer.quantized]

    @property
    def kept(self) -> list[str]:
        """Names of the layers that keep their 16-bit weights."""
        return [name for name, layer in self.layers.items() if not layer.quantized]

    def quantizes(self, name: str) -> bool:
        """Whether a layer becomes FP8: a finished Plan used as a Planner."""
        return name in self.layers and self.layers[name].quantized

    def input_amax(self, name: str) -> float | None:
        """Return the largest |x| of a layer's input, None where it is not known."""
        return self.layers[name].input_amax if name in self.layers else None

    def add(self, name: str, weight: torch.Tensor) -> float | None:
        """Return the amax of a layer, None to keep it; nothing is searched.

        Raises:
            ValueError: the Plan is of another model, which has no such layer.
        """
        if name not in self.layers:
            raise ValueError(f"the plan belongs to another model: it has no layer {name!r}")
        return self.layers[name].amax

    def finish(self) -> Plan:
        """Return itself, as Planner.finish does."""
        return self


def check_keep_ratio(keep_ratio: float) -> float:
    """Return keep_ratio as a float.

    Raises:
        ValueError: it is not a number from 0 to 1.
    """
    number = isinstance(keep_ratio, (int, float)) and not isinstance(keep_ratio, bool)
    if not number or not 0 <= keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be a number from 0 to 1, got {keep_ratio!r}")
    return float(keep_ratio)


def select_kept(statistics: Mapping[str, MeasuredLayer], keep_ratio: float) -> frozenset[str]:
    """Return the layers that keep their weights (HSWQ.md, "Layer selection").

    The first `int(N * keep_ratio)` of the N measured layers by sensitivity, highest first; equal
    ones in the mapping's order, which is the model's.
    """
    ranked = {name: layer.sensitivity for name, layer in statistics.items() if is_finite(layer)}
    # The sort is stable, so equal ones stay in order.
    names = sorted(ranked, key=lambda name: -ranked[name])
    return frozenset(names[: int(len(names) * check_keep_ratio(keep_ratio))])


def is_finite(measured: MeasuredLayer) -> bool:
    """Whether a layer's sensitivity and every channel's importance are finite numbers."""
    importance = measured.importance
    return math.isfinite(measured.sensitivity) and (
        importance is None or bool(importance.isfinite().all())
    )


def reasons_of(statistics: Mapping[str, MeasuredLayer], keep_ratio: float) -> dict[str, str]:
    """Return why each measured layer is kept or quantized."""
    kept = select_kept(statistics, keep_ratio)
    return {
        name: KEPT_SENSITIVE if name in kept else _reason_of_others(measured)
        for name, measured in statistics.items()
    }


def _reason_of_others(measured: MeasuredLayer) -> str:
    return QUANTIZED if is_finite(measured) else KEPT_NOT_FINITE


def expected_error(layers: Iterable[tuple[float, int]]) -> float:
    """Return what quantizing a model adds to its weights, as a share of them.

    The root of the mean of the squared relative errors, in which every parameter counts alike.

    Args:
        layers: relative error (LayerPlan) and number of weights of every measured layer; a kept
            one has the error 0.
    """
    squares = weights = 0.0
    for error, count in layers:
        squares += error * error * count
        weights += count
    return math.sqrt(squares / weights) if weights else 0.0
