"""Deciding about a model's layers while its weights are loaded one at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

import torch

from .findings import Findings
from .formats import FP8_SCALED, Clipping, NumberFormat, fp8_format
from .plan import LayerPlan, Plan, known_errors
from .reasons import Reason
from .search import DEFAULT_SETTINGS, SearchSettings
from .selection import DEFAULT_SELECTION, BySensitivity, MeasuredLayer, Selection


class Planner:
    """Makes a Plan layer by layer, so that no two weights need to be in memory at once.

    Each search runs on its weight's device. `finish` copies all results to the host at once.

    Attributes:
        selection, number_format, settings, samples: as given.
        known: what was found before; empty where nothing was.
    """

    def __init__(
        self,
        statistics: Mapping[str, MeasuredLayer] | None,
        selection: Selection = DEFAULT_SELECTION,
        number_format: NumberFormat = FP8_SCALED,
        *,
        settings: SearchSettings = DEFAULT_SETTINGS,
        samples: int = 0,
        known: Findings | None = None,
        sketches: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Select the layers to keep.

        Args:
            statistics: by layer name, in the model's order. None quantizes every layer with
                uniform importance: without sensitivities no layer can be preferred.
            selection: chooses the layers that stay 16 bit.
            number_format: of the other layers.
            settings: of the search.
            samples: number of latent images that the statistics come from.
            known: what was found about this model before, with the same settings. Layers are
                selected by its sensitivities, so that all selections use the same numbers.
            sketches: as Decider's. With them, the output errors in `known` count too.
        """
        self.selection = selection
        self.number_format = number_format
        self.settings = settings
        self.samples = samples
        self.sketches, self.refined = sketches, None
        self._statistics = statistics
        self.known = known or Findings({})
        self._ranked = known.measured if known is not None else statistics or {}
        self._reasons = selection.choose(self._ranked)
        self._layers: dict[str, LayerPlan] = {}
        self._searched: dict[str, torch.Tensor] = {}
        self._shares: dict[str, torch.Tensor] = {}
        self.output_errors = {} if sketches is None else known_errors(self.known.layers)
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
            self._reasons = self.selection.choose(self._ranked)
        return unknown

    def quantizes(self, name: str) -> bool:
        """Whether a layer is quantized."""
        return self.reason(name) in (Reason.QUANTIZED, Reason.QUANTIZED_UNIFORM)

    def searches(self, name: str) -> bool:
        """Whether `clipping_of` needs a layer's weight: it is quantized and not known."""
        return self.quantizes(name) and self.known.amax(name) is None

    def input_amax(self, name: str) -> float | None:
        """Return the largest |x| of a layer's input; None where the statistics do not say."""
        amax = getattr(self._ranked.get(name), "input_amax", None)
        return None if amax is None or not math.isfinite(amax) else amax

    def reason(self, name: str) -> Reason:
        """Return why a layer is kept or quantized."""
        if name in self.selection.also_keep:
            return Reason.KEPT_BY_NAME
        if self._statistics is None:
            return Reason.QUANTIZED_UNIFORM
        return self._reasons.get(name, Reason.KEPT_UNMEASURED)

    def clipping_of(self, name: str, weight: torch.Tensor | None) -> Clipping | None:
        """Plan one layer; return where it is clipped, or None where it is kept.

        What was just searched are tensors on the weight's device.

        Args:
            name: of the layer, relative to the diffusion model.
            weight: (out, in, ...), on the device that is to search; None if `searches` is False.
        """
        reason = self.reason(name)
        ranked = self._ranked.get(name)
        known = ranked is not None and reason is not Reason.KEPT_NOT_FINITE
        sensitivity = ranked.sensitivity if known else None  # JSON has no nan
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
                row_shares=found.row_shares,
            )  # fmt: skip
            return self._layers[name].clipping
        return self._search(layer, weight)

    def known_plan(self) -> Plan | None:
        """Return the Plan if all of it is known already; None where a layer must be searched.

        Raises:
            ValueError: as `finish`.
        """
        names = self.known.layers
        if not names or any(map(self.searches, names)):
            return None
        for name in names:
            self.clipping_of(name, None)
        return self.finish()

    def finish(self) -> Plan:
        """Return the Plan of all layers that were asked about.

        Raises:
            ValueError: the statistics name layers that were never asked about: they belong to
                another model.
        """
        missing = [name for name in self._statistics or {} if name not in self._layers]
        if missing:
            raise ValueError(
                f"the statistics belong to another model: {len(missing)} of their "
                f"{len(self._statistics)} layers are not in this one, the first is {missing[0]!r}"
            )
        layers, shares = dict(self._layers), _shares_to_host(self._shares)
        for name, (amax, error, power, finite) in _to_host(self._searched).items():
            relative = math.sqrt(error / power)
            more = () if finite else (f"{name} has weights that are not finite; inf was clipped",)
            layers[name] = dataclasses.replace(
                layers[name],
                amax=amax, relative_error=relative, warnings=layers[name].warnings + more,
                row_shares=shares.get(name),
            )  # fmt: skip
        frozen = MappingProxyType(layers)
        plan = Plan(self.number_format, self.selection, frozen, self.settings, self.samples)
        return plan.with_output_errors(self.output_errors)

    def _search(self, layer: LayerPlan, weight: torch.Tensor) -> Clipping:
        measured = None if self._statistics is None else self._statistics.get(layer.name)
        importance = None if measured is None else measured.importance
        warnings = _channel_warnings(layer.name, weight, importance)
        self._layers[layer.name] = dataclasses.replace(layer, warnings=warnings)
        found = self.number_format.search(weight, importance, self.settings)
        amax, shares, _ = found.clipping
        self._searched[layer.name] = torch.stack((amax, found.error, found.power, found.finite))
        if shares is not None:
            self._shares[layer.name] = shares
        return found.clipping


def make_plan(
    layers: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    statistics: Mapping[str, MeasuredLayer] | None,
    keep_ratio: float,
    scaled: bool,
    settings: SearchSettings = DEFAULT_SETTINGS,
) -> Plan:
    """Plan all layers of a model.

    Args:
        layers: weights (out, in, ...) by layer name; or pairs of both, which an iterator may
            produce one at a time.
        statistics: by layer name; None quantizes every layer with uniform importance.
        keep_ratio: share of the measured layers that stay 16 bit, 0 to 1.
        scaled: V2 (True) or V1.
        settings: of the search.

    Raises:
        ValueError: keep_ratio is out of range, or the statistics name layers not in `layers`.
    """
    planner = Planner(statistics, BySensitivity(keep_ratio), fp8_format(scaled), settings=settings)
    for name, weight in layers.items() if isinstance(layers, Mapping) else layers:
        planner.clipping_of(name, weight)
    return planner.finish()


def _channel_warnings(
    name: str, weight: torch.Tensor, importance: torch.Tensor | None
) -> tuple[str, ...]:
    channels = weight.shape[1] if weight.ndim > 1 else 1
    # If an input has no channel axis, the Dual Monitor gives a single value.
    if importance is None or importance.numel() in (1, channels):
        return ()
    return (
        f"{name} has {channels} input channels, but its statistics have {importance.numel()}: "
        "do they belong to another model?",
    )


def _to_host(results: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Copy rows of numbers to the host in one transfer."""
    if not results:
        return {}
    return dict(zip(results, torch.stack(list(results.values())).tolist(), strict=True))


def _shares_to_host(shares: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Copy layers' row_shares, uint8 tensors, to the host in one transfer."""
    if not shares:
        return {}
    together = torch.cat(list(shares.values())).cpu()
    parts = together.split([len(one) for one in shares.values()])
    return {name: part.numpy().tobytes() for name, part in zip(shares, parts, strict=True)}
