"""Making a Plan while weights stream past."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

import torch

from .findings import Findings
from .histogram import weighted_histogram
from .plan import (
    KEPT_NOT_FINITE,
    KEPT_UNMEASURED,
    QUANTIZED,
    QUANTIZED_UNIFORM,
    LayerPlan,
    MeasuredLayer,
    Plan,
    check_keep_ratio,
    reasons_of,
)
from .search import DEFAULT_SETTINGS, SearchSettings, search_amax


class Planner:
    """Makes a Plan layer by layer, so that weights can be streamed past it.

    The search stays on each weight's device: `finish` reads all results back at once.

    Attributes:
        keep_ratio, scaled, settings, samples: as given.
        known: what was found before.
    """

    def __init__(
        self,
        statistics: Mapping[str, MeasuredLayer] | None,
        keep_ratio: float,
        *,
        scaled: bool,
        settings: SearchSettings = DEFAULT_SETTINGS,
        samples: int = 0,
        known: Findings | None = None,
    ) -> None:
        """Select the layers to keep.

        Args:
            statistics: by layer name, in the model's order. None quantizes every layer with
                uniform importance: without a sensitivity there is nothing to choose by.
            keep_ratio: share of the measured layers that stay 16 bit, 0 to 1.
            scaled: V2 (True) or V1.
            settings: of the search.
            samples: that the statistics come from.
            known: what was found of this model before, with the same settings. It is selected by
                their sensitivities, so that a Plan for another keep_ratio is of the same kind.

        Raises:
            ValueError: keep_ratio is out of range.
        """
        self.keep_ratio = check_keep_ratio(keep_ratio)
        self.scaled = scaled
        self.settings = settings
        self.samples = samples
        self._statistics = statistics
        self.known = known or Findings({})
        self._ranked = known.measured if known is not None else statistics or {}
        self._reasons = reasons_of(self._ranked, self.keep_ratio)
        self._layers: dict[str, LayerPlan] = {}
        self._searched: dict[str, torch.Tensor] = {}
        if known is not None:
            self.restrict(known.layers)

    def unknown(self, layers: Collection[str]) -> list[str]:
        """Return the measured layers that are not among a model's."""
        return [name for name in self._statistics or {} if name not in layers]

    def restrict(self, layers: Collection[str]) -> list[str]:
        """Leave out statistics of layers that the model does not have; return their names.

        A node may have put such layers into it while it was measured. Where the model has layers
        that were not measured, the statistics are another model's: then they stay as they are,
        and `finish` refuses them.

        Args:
            layers: names of all Linear and Conv2d layers of the model.
        """
        unknown = self.unknown(layers)
        if not unknown or not layers or any(name not in self._statistics for name in layers):
            return []
        self._statistics = {k: one for k, one in self._statistics.items() if k in layers}
        if not self.known.layers:
            self._ranked = self._statistics
            self._reasons = reasons_of(self._ranked, self.keep_ratio)
        return unknown

    def quantizes(self, name: str) -> bool:
        """Whether a layer becomes FP8."""
        return self.reason(name) in (QUANTIZED, QUANTIZED_UNIFORM)

    def searches(self, name: str) -> bool:
        """Whether `add` looks at a layer's weight: it becomes FP8, and its amax is not known."""
        return self.quantizes(name) and self.known.amax(name) is None

    def input_amax(self, name: str) -> float | None:
        """Return the largest |x| of a layer's input, None where the statistics do not say."""
        amax = getattr(self._ranked.get(name), "input_amax", None)
        return None if amax is None or not math.isfinite(amax) else amax

    def reason(self, name: str) -> str:
        """Return why a layer is kept or quantized."""
        if self._statistics is None:
            return QUANTIZED_UNIFORM
        return self._reasons.get(name, KEPT_UNMEASURED)

    def add(self, name: str, weight: torch.Tensor | None) -> torch.Tensor | float | None:
        """Plan one layer; return its amax, or None where it is kept.

        An amax that is searched is a FP32 scalar tensor on the weight's device.

        Args:
            name: of the layer, relative to the diffusion model.
            weight: (out, in, ...), on the device that shall search.
        """
        reason = self.reason(name)
        ranked = self._ranked.get(name)
        # JSON has no nan.
        sensitivity = None if ranked is None or reason == KEPT_NOT_FINITE else ranked.sensitivity
        input_amax = self.input_amax(name)
        layer = LayerPlan(name, None, reason, sensitivity, input_amax=input_amax)
        self._layers[name] = layer
        if not self.quantizes(name):
            return None
        if not self.searches(name):
            found = self.known.layers[name]
            self._layers[name] = dataclasses.replace(
                layer,
                amax=found.amax, relative_error=found.relative_error, warnings=found.warnings,
            )  # fmt: skip
            return found.amax
        return self._search(layer, weight)

    def known_plan(self) -> Plan | None:
        """Return the Plan of a model of which all is known; None where a layer must be searched.

        Raises:
            ValueError: as `finish`.
        """
        names = self.known.layers
        if not names or any(map(self.searches, names)):
            return None
        for name in names:
            self.add(name, None)
        return self.finish()

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
        layers = dict(self._layers)
        for name, (amax, error, power, finite) in _to_host(self._searched).items():
            relative = math.sqrt(error / power)
            more = () if finite else (f"{name} has weights that are not finite; inf was clipped",)
            layers[name] = dataclasses.replace(
                layers[name],
                amax=amax, relative_error=relative, warnings=layers[name].warnings + more,
            )  # fmt: skip
        frozen = MappingProxyType(layers)
        return Plan(self.scaled, self.keep_ratio, frozen, self.settings, self.samples)

    def _search(self, layer: LayerPlan, weight: torch.Tensor) -> torch.Tensor:
        measured = None if self._statistics is None else self._statistics.get(layer.name)
        importance = None if measured is None else measured.importance
        warnings = _channel_warnings(layer.name, weight, importance)
        self._layers[layer.name] = dataclasses.replace(layer, warnings=warnings)
        histogram = weighted_histogram(weight, importance, self.settings.bins)
        found = search_amax(histogram, self.settings, scaled=self.scaled)
        self._searched[layer.name] = torch.stack((*found, histogram.finite))
        return found.amax


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


def _channel_warnings(
    name: str, weight: torch.Tensor, importance: torch.Tensor | None
) -> tuple[str, ...]:
    channels = weight.shape[1] if weight.ndim > 1 else 1
    # A single value is what the Dual Monitor has of inputs without a channel axis.
    if importance is None or importance.numel() in (1, channels):
        return ()
    return (
        f"{name} has {channels} input channels, its statistics {importance.numel()}: "
        "are they of another model?",
    )


def _to_host(results: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Read rows of numbers back from the device in one transfer."""
    if not results:
        return {}
    return dict(zip(results, torch.stack(list(results.values())).tolist(), strict=True))
