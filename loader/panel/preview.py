"""What a Plan would do for any keep_ratio, from earlier searches. Nothing is searched here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from ...quant import NumberFormat, Planner, QuantizeSettings, bytes_of, expected_error
from ..jobs.choice import AUTO, planner_for, statistics_version
from ..jobs.model_files import Shapes, shapes_of
from ..store import milestones
from ..store.search_cache import findings_key
from .catalogue import Model

_KINDS = {2: "Linear", 4: "Conv2d"}


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


def ends_of(model: Model) -> frozenset[str]:
    """Return the first and the last projection, which the loader keeps by default."""
    return _shapes(model).ends


def preview(model: Model, settings: QuantizeSettings) -> dict:
    """Return the Plan that the loader would make with these settings, as far as it is known.

    A layer's amax and error are known once any load, export or HSWQPlan has searched the layer,
    with whatever keep_ratio.

    Args:
        model: with statistics.
        settings: mode, keep_ratio and search.

    Raises:
        ValueError: keep_ratio is out of range.
    """
    kept = milestones.kept_of(model.fingerprint, model.statistics)
    if kept is not None:
        model = dataclasses.replace(model, statistics=kept)
    version = statistics_version(AUTO, model.statistics)
    planner = planner_for(
        model.statistics, settings, findings_key(model.fingerprint, version, settings)
    )
    shapes = _shapes(model)
    names = list(planner.known.layers) or _names(model.statistics, shapes)
    quantized = [name for name in names if planner.quantizes(name)]
    before, after = _bytes(quantized, shapes, settings.number_format)
    return {
        "mode": settings.number_format.name,
        "keep_ratio": settings.selection.keep_ratio,
        "kept": len(names) - len(quantized),
        "quantized": len(quantized),
        "searched": sum(not planner.searches(name) for name in quantized),
        "bytes_before": before,
        "bytes_after": after,
        "expected_error": _expected_error(model, planner, shapes),
        "layers": {name: _layer(planner, name) for name in names},
    }


def _layer(planner: Planner, name: str) -> dict:
    found = planner.known.layers.get(name)
    return {
        "kept": not planner.quantizes(name),
        "amax": found and found.amax,
        "relative_error": found and found.relative_error,
        "reason": planner.reason(name).value,
    }


def _expected_error(model: Model, planner: Planner, shapes: Shapes) -> float | None:
    """Return the Plan's error, None where a layer was not searched or its size is not known."""
    parts = []
    for name in model.statistics:
        quantized = planner.quantizes(name)
        if name not in shapes.layers or planner.searches(name):
            return None
        error = planner.known.layers[name].relative_error if quantized else 0.0
        parts.append((error, math.prod(shapes.layers[name])))
    return expected_error(parts)


def _bytes(
    quantized: list[str], shapes: Shapes, number_format: NumberFormat
) -> tuple[int | None, int | None]:
    """Return the bytes of a model's parameters in 16 bit, and as the loader quantizes them.

    Whatever is not quantized is 16 bit. None where the shapes are not known.
    """
    if not shapes.parameters or any(name not in shapes.layers for name in quantized):
        return None, None
    before = 2 * shapes.parameters
    saved = sum(
        2 * math.prod(shape) - bytes_of(number_format, shape)
        for shape in map(shapes.layers.get, quantized)
    )
    return before, before - saved


def _shapes(model: Model) -> Shapes:
    """Return the shapes in the model's file; none where it is gone or has other layer names."""
    try:
        found = shapes_of(model.source) if model.source else Shapes({}, 0)
    except (OSError, ValueError):  # deleted or overwritten just now
        found = Shapes({}, 0)
    measured = model.statistics or {}
    return found if found.layers.keys() >= measured.keys() else Shapes({}, 0)


def _names(measured: Iterable[str], shapes: Shapes) -> list[str]:
    """Return the measured layers in the model's order, then those that were never called."""
    return list(dict.fromkeys([*measured, *shapes.layers]))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
