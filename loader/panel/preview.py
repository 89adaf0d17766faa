"""What a Plan would do for any settings, from earlier searches. Nothing is searched here."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping

from ...calibration import LayerStatistics, Statistics
from ...quant import (
    ByEffect,
    BySensitivity,
    Findings,
    LayerFinding,
    Planner,
    QuantizeSettings,
    Selection,
    is_finite,
)
from ..jobs.choice import AUTO, statistics_version
from ..jobs.keeping import BY_EFFECT, NOT_MEASURED, Keeping, costs_of, measured_effects
from ..jobs.model_files import Shapes, shapes_of
from ..jobs.outcome import Ledger, Sizes, error_of
from ..store import milestones
from ..store.search_cache import find_findings, findings_key
from .catalogue import Model

_KINDS = {2: "Linear", 4: "Conv2d"}
_KNOWN = 4  # statistics of SDXL have 8 MiB


def rows(model: Model) -> list[dict]:
    """Return a model's layers with what was measured of them, in the model's order."""
    shapes = _shapes(model)
    known = model.statistics or {}
    return [
        {
            "layer": name,
            "kind": _KINDS.get(len(shape or ())),
            "shape": shape,
            "parameters": None if shape is None else math.prod(shape),
            "sensitivity": _finite(known[name].sensitivity) if name in known else None,
            "calls": known[name].calls if name in known else 0,
        }
        for name in _names(known, shapes)
        for shape in [shapes.layers.get(name)]
    ]


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What was recorded of a model that has statistics, whatever the number format.

    Attributes:
        fingerprint: of the model's weights.
        version: a key that changes with the statistics by which the model is quantized.
        samples: images that they come from.
        measured: the layers that have statistics, without importances.
        shapes: of the model's file.
        sketched: names of the layers that have sketches by which the loader rounds.
    """

    fingerprint: str
    version: str
    samples: int
    measured: Mapping[str, LayerFinding]
    shapes: Shapes
    sketched: frozenset[str]

    @classmethod
    def of(cls, model: Model) -> Recorded:
        """Look it up."""
        kept = milestones.sums_of(model.fingerprint, model.statistics)
        statistics = model.statistics if kept is None else kept
        measured, version = _measured(statistics)
        facts = version, statistics.samples, measured, _shapes(model)
        return cls(model.fingerprint, *facts, _sketched(kept))


@dataclasses.dataclass(frozen=True)
class Basis:
    """What is known of a model, by which the Plan of any selection is told.

    Attributes:
        settings: number format, search and rounding.
        measured: the layers that have statistics, without importances.
        found: what searches found; of the measured layers alone where nothing was searched.
        names: all layers, in the model's order.
        shapes: of the model's file.
        compensated: names of the layers whose rounding is compensated.
        samples: images that the statistics come from.
        effects: of quantizing each layer alone, as far as measured (see quant.ByEffect).
    """

    settings: QuantizeSettings
    measured: Mapping[str, LayerFinding]
    found: Findings
    names: list[str]
    shapes: Shapes
    compensated: frozenset[str]
    samples: int
    effects: Mapping[str, float]

    @classmethod
    def of(cls, its: Recorded, settings: QuantizeSettings) -> Basis:
        """Look up what is known of a model in a number format; the selection does not count.

        A layer's error is known once a search, load or export has quantized it in this format.
        """
        found = find_findings(findings_key(its.fingerprint, its.version, settings))
        if found is None:
            names, found = _names(its.measured, its.shapes), Findings(its.measured, its.samples)
        else:
            names = list(found.layers)
        return cls(
            settings,
            its.measured,
            found,
            names,
            its.shapes,
            its.sketched if settings.compensated else frozenset(),
            found.samples,
            measured_effects(its.fingerprint, settings.number_format) or {},
        )

    @functools.cached_property
    def costs(self) -> dict[str, int]:
        """The bytes that keeping a layer adds, for the layers whose effects are measured."""
        return costs_of(self.shapes.sizes.layers, self.settings.number_format, self.effects)

    @functools.cached_property
    def has_effects(self) -> bool:
        """Whether layers can be kept by measured effect."""
        return bool(self.costs) and self.costs.keys() == self.effects.keys()

    def selection(self, keeping: Keeping) -> Selection:
        """Return the selection that the loader would make; `also_keep` is at its default.

        Raises:
            ValueError: it goes by effects, which are not measured.
        """
        ends = self.shapes.ends
        if keeping.selection != BY_EFFECT:
            return BySensitivity(keeping.keep_ratio, ends)
        if not self.has_effects:
            raise ValueError(NOT_MEASURED)
        return ByEffect(int(keeping.keep_mb * (1 << 20)), self.effects, self.costs, ends)

    def effect(self, quantized: Iterable[str]) -> float | None:
        """Return the sum of the effects of quantizing these layers; None if not measured."""
        if not self.has_effects:
            return None
        return math.fsum(map(self.effects.get, quantized, itertools.repeat(0.0)))

    def planner(self, selection: Selection) -> Planner:
        """Return what decides about layers."""
        number_format, search = self.settings.number_format, self.settings.search
        return Planner(self.measured, selection, number_format, settings=search, known=self.found)

    @functools.cached_property
    def ledger(self) -> Ledger:
        """What quantizing each layer does."""
        known, sizes = self.found.layers, self.shapes.sizes
        number_format = self.settings.number_format
        return Ledger.of(known, sizes, number_format, self.samples, self.compensated)

    def error(self, name: str) -> tuple[float | None, bool]:
        """Return a layer's error once it is quantized, and whether that is exact."""
        return error_of(self.found.layers.get(name), name in self.compensated)


def preview(model: Model, settings: QuantizeSettings) -> dict:
    """Return the Plan that the loader would make with these settings, as far as it is known.

    Args:
        model: with statistics.
        settings: number format, selection, search and rounding.

    Raises:
        ValueError: a setting is out of range.
    """
    return preview_of(Basis.of(Recorded.of(model), settings), settings.selection)


def preview_of(basis: Basis, selection: Selection) -> dict:
    """Return the same of a model that was looked up."""
    planner = basis.planner(selection)
    quantized = [name for name in basis.names if planner.quantizes(name)]
    outcome = basis.ledger.outcome(quantized)
    return {
        "mode": basis.settings.number_format.name,
        "kept": len(basis.names) - len(quantized),
        "quantized": len(quantized),
        "searched": sum(basis.error(name)[1] for name in quantized),
        "bytes_before": outcome.before,
        "bytes_after": outcome.after,
        "expected_error": outcome.error,
        "outcome": outcome.to_json(),
        "layers": {name: _layer(basis, planner, name) for name in basis.names},
    }


def _layer(basis: Basis, planner: Planner, name: str) -> dict:
    found = basis.found.layers.get(name)
    return {
        "kept": not planner.quantizes(name),
        "amax": found and found.amax,
        "relative_error": found and found.relative_error,
        "error": basis.error(name)[0],
        "reason": planner.reason(name).value,
    }


_known: collections.OrderedDict[int, tuple[Statistics, dict, str]] = collections.OrderedDict()
"""What was found about the statistics that were asked for last, by their ids, which they keep."""


def _measured(statistics: Statistics) -> tuple[dict[str, LayerFinding], str]:
    """Return the layers of some statistics without importances, and the statistics' version.

    To look at every layer would take most of the time of a preview, so that is done once.
    """
    known = _known.get(id(statistics))
    if known is None:
        measured = {name: _without_importance(one) for name, one in statistics.items()}
        known = statistics, measured, statistics_version(AUTO, statistics)
        _known[id(statistics)] = known
        while len(_known) > _KNOWN:
            _known.popitem(last=False)
    return known[1:]


def _without_importance(measured: LayerStatistics) -> LayerFinding:
    return LayerFinding(measured.sensitivity if is_finite(measured) else math.nan)


def _sketched(kept: Statistics | None) -> frozenset[str]:
    """Return the layers that have sketches by which the loader rounds, of a milestone that is kept.

    Where none is kept yet, there are none: to add up all files would take seconds.
    """
    sketches = None if kept is None else milestones.kept_sketches(kept)
    if sketches is None:
        return frozenset()
    try:
        return frozenset(sketches)
    finally:
        sketches.close()


def _shapes(model: Model) -> Shapes:
    """Return the shapes in the model's file; none where it is gone or has other layer names."""
    nothing = Shapes(Sizes({}, 0))
    try:
        found = shapes_of(model.source) if model.source else nothing
    except (OSError, ValueError):  # deleted or overwritten just now
        found = nothing
    measured: Statistics | dict = model.statistics or {}
    return found if found.layers.keys() >= measured.keys() else nothing


def _names(measured: Iterable[str], shapes: Shapes) -> list[str]:
    """Return the measured layers in the model's order, then those that were never called."""
    return list(dict.fromkeys([*measured, *shapes.layers]))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
