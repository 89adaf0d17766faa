"""The Plan: what happens to every layer, and why. Nothing else decides anything about a layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from .fp8 import FP8_MAX
from .histogram import weighted_histogram
from .search import DEFAULT_SETTINGS, SearchSettings, search_amax

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
    """

    name: str
    amax: float | None
    reason: str
    sensitivity: float | None = None
    relative_error: float | None = None

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
        warnings: sentences about statistics that do not fit the weights.
    """

    scaled: bool
    keep_ratio: float
    layers: Mapping[str, LayerPlan]
    settings: SearchSettings = DEFAULT_SETTINGS
    warnings: tuple[str, ...] = ()

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

    def to_json(self) -> dict:
        """Return a JSON-ready dict that from_json turns back into an equal Plan."""
        return {
            "scaled": self.scaled,
            "keep_ratio": self.keep_ratio,
            "settings": dataclasses.asdict(self.settings),
            "warnings": list(self.warnings),
            "layers": [dataclasses.asdict(layer) for layer in self.layers.values()],
        }

    @classmethod
    def from_json(cls, data: dict) -> Plan:
        """Rebuild a Plan.

        Raises:
            ValueError, KeyError, TypeError: `data` is not what to_json returned.
        """
        layers = [LayerPlan(**layer) for layer in data["layers"]]
        return cls(
            scaled=bool(data["scaled"]),
            keep_ratio=check_keep_ratio(data["keep_ratio"]),
            layers=MappingProxyType({layer.name: layer for layer in layers}),
            settings=SearchSettings(**data["settings"]),
            warnings=tuple(data["warnings"]),
        )


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


def _reasons(statistics: Mapping[str, MeasuredLayer], keep_ratio: float) -> dict[str, str]:
    """Return why each measured layer is kept or quantized."""
    kept = select_kept(statistics, keep_ratio)
    return {
        name: KEPT_SENSITIVE if name in kept else _reason_of_others(measured)
        for name, measured in statistics.items()
    }


def _reason_of_others(measured: MeasuredLayer) -> str:
    return QUANTIZED if is_finite(measured) else KEPT_NOT_FINITE


class Planner:
    """Makes a Plan layer by layer, so that weights can be streamed past it.

    The search stays on each weight's device: `finish` reads all results back at once.
    """

    def __init__(
        self,
        statistics: Mapping[str, MeasuredLayer] | None,
        keep_ratio: float,
        *,
        scaled: bool,
        settings: SearchSettings = DEFAULT_SETTINGS,
    ) -> None:
        """Select the layers to keep.

        Args:
            statistics: by layer name, in the model's order. None quantizes every layer with
                uniform importance: without a sensitivity there is nothing to choose by.
            keep_ratio: share of the measured layers that stay 16 bit, 0 to 1.
            scaled: V2 (True) or V1.
            settings: of the search.

        Raises:
            ValueError: keep_ratio is out of range.
        """
        self.keep_ratio = check_keep_ratio(keep_ratio)
        self.scaled = scaled
        self.settings = settings
        self._statistics = statistics
        self._reasons = _reasons(statistics or {}, self.keep_ratio)
        self._layers: dict[str, LayerPlan] = {}
        self._searched: dict[str, torch.Tensor] = {}
        self._warnings: list[str] = []

    def quantizes(self, name: str) -> bool:
        """Whether a layer becomes FP8; only then `add` looks at its weight."""
        return self._reason(name) in (QUANTIZED, QUANTIZED_UNIFORM)

    def add(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        """Plan one layer; return its amax (FP32 scalar tensor on the weight's device), or None.

        Args:
            name: of the layer, relative to the diffusion model.
            weight: (out, in, ...), on the device that shall search.
        """
        measured = None if self._statistics is None else self._statistics.get(name)
        reason = self._reason(name)
        sensitivity = None if measured is None else measured.sensitivity
        if reason == KEPT_NOT_FINITE:
            sensitivity = None  # JSON has no nan
        self._layers[name] = LayerPlan(name, None, reason, sensitivity)
        if reason not in (QUANTIZED, QUANTIZED_UNIFORM):
            return None
        importance = None if measured is None else measured.importance
        self._check_channels(name, weight, importance)
        histogram = weighted_histogram(weight, importance, self.settings.bins)
        found = search_amax(histogram, self.settings, scaled=self.scaled)
        self._searched[name] = torch.stack((*found, histogram.finite))
        return found.amax

    def finish(self) -> Plan:
        """Return the Plan of all layers added.

        Raises:
            ValueError: the statistics name layers that were never added: another model's.
        """
        missing = [name for name in self._statistics or {} if name not in self._layers]
        if missing:
            raise ValueError(
                f"the statistics belong to another model: {len(missing)} of their "
                f"{len(self._statistics)} layers are not in this one, the first is {missing[0]!r}"
            )
        layers, warnings = dict(self._layers), list(self._warnings)
        for name, (amax, error, power, finite) in _to_host(self._searched).items():
            relative = math.sqrt(error / power)
            layers[name] = dataclasses.replace(layers[name], amax=amax, relative_error=relative)
            if not finite:
                warnings.append(f"{name} has weights that are not finite; inf was clipped")
        frozen = MappingProxyType(layers)
        return Plan(self.scaled, self.keep_ratio, frozen, self.settings, tuple(warnings))

    def _reason(self, name: str) -> str:
        if self._statistics is None:
            return QUANTIZED_UNIFORM
        return self._reasons.get(name, KEPT_UNMEASURED)

    def _check_channels(
        self, name: str, weight: torch.Tensor, importance: torch.Tensor | None
    ) -> None:
        channels = weight.shape[1] if weight.ndim > 1 else 1
        # A single value is what the Dual Monitor has of inputs without a channel axis.
        if importance is not None and importance.numel() not in (1, channels):
            self._warnings.append(
                f"{name} has {channels} input channels, its statistics {importance.numel()}: "
                "are they of another model?"
            )


def make_plan(
    layers: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    statistics: Mapping[str, MeasuredLayer] | None,
    keep_ratio: float,
    scaled: bool,
    settings: SearchSettings = DEFAULT_SETTINGS,
) -> Plan:
    """Plan all layers of a model.

    Args:
        layers: weights (out, in, ...) by layer name, or pairs that may be produced one at a time.
        statistics: by layer name; None quantizes every layer with uniform importance.
        keep_ratio: share of the measured layers that stay 16 bit, 0 to 1.
        scaled: V2 (True) or V1.
        settings: of the search.

    Raises:
        ValueError: keep_ratio is out of range, or the statistics name layers not in `layers`.
    """
    planner = Planner(statistics, keep_ratio, scaled=scaled, settings=settings)
    for name, weight in layers.items() if isinstance(layers, Mapping) else layers:
        planner.add(name, weight)
    return planner.finish()


def _to_host(results: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Read rows of numbers back from the device in one transfer."""
    if not results:
        return {}
    return dict(zip(results, torch.stack(list(results.values())).tolist(), strict=True))
