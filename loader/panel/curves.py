"""Curves for the panel: size against expected error, for every number format and selection."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from ...quant import NUMBER_FORMATS, NumberFormat, QuantizeSettings
from ..files.layer_formats import FILE_FORMATS
from ..jobs.card import Card
from ..jobs.keeping import BY_EFFECT, BY_SENSITIVITY, Keeping
from .catalogue import Model
from .preview import Basis, Recorded

_STEPS = 100
_NOT_OFFERED = ("original V2",)
"""On today's ComfyUI only our loaders read this format. The export node still writes it."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A kind of selection with one number, from 0 (nothing kept) to 1 (everything kept).

    Attributes:
        name: of the selection, for users.
        keeping: takes the number, returns what stays 16 bit.
        inputs: names of the attributes of Keeping that are set by it, as loader and export call
            their inputs.
        is_known: whether what it goes by is known of a model.
    """

    name: str
    keeping: Callable[[float, Basis], Keeping]
    inputs: tuple[str, ...]
    is_known: Callable[[Basis], bool]


def _by_sensitivity(share: float, _: Basis) -> Keeping:
    return Keeping(share, selection=BY_SENSITIVITY)


def _by_effect(share: float, basis: Basis) -> Keeping:
    """Return a budget in whole tenths of a MiB, which is the step of the nodes' input."""
    most = max(0, sum(basis.costs.values()))
    tenths = math.ceil(10 * share * most / (1 << 20))
    return Keeping(selection=BY_EFFECT, keep_mb=tenths / 10)


WAYS = (
    Way("sensitivity", _by_sensitivity, ("selection", "keep_ratio"), lambda _: True),
    Way(
        "effect",
        _by_effect,
        ("selection", "keep_mb", "fit_gb"),
        lambda basis: basis.has_effects,
    ),
)
"""All of them. The panel draws a line for each that is known, in each number format."""


def curves(model: Model) -> dict:
    """Return the lines of a model that has statistics, and how many bytes fit this card.

    Every point has the inputs that lead to it, so that the panel can set a node or an export.
    """
    its = Recorded.of(model)
    bases = [
        Basis.of(its, QuantizeSettings(number_format, compensated=True))
        for number_format in NUMBER_FORMATS.values()
    ]
    lines = [_line(basis, way) for basis in bases for way in WAYS if way.is_known(basis)]
    first, fits = lines[0]["points"][0], Card.of(bases[0].shapes.beside).weights
    return {"before": first["before"], "fits": fits, "samples": first["samples"], "lines": lines}


def _line(basis: Basis, way: Way) -> dict:
    number_format = basis.settings.number_format
    return {
        "mode": number_format.name,
        "selection": way.name,
        "inputs": {"mode": number_format.name},
        "formats": _formats(number_format),
        "points": _points(basis, way),
    }


def _formats(number_format: NumberFormat) -> list[str]:
    """Return the file formats of a line."""
    return [
        name
        for name, one in FILE_FORMATS.items()
        if one.number_format == number_format and name not in _NOT_OFFERED
    ]


def _points(basis: Basis, way: Way) -> list[dict]:
    """Return what every share comes to; the layers are ranked once for all of them."""
    selections = [
        (keeping, basis.selection(keeping))
        for keeping in (way.keeping(step / _STEPS, basis) for step in range(_STEPS + 1))
    ]
    least = selections[0][1]  # the others keep its layers, and more
    planner, ranked = basis.planner(least), least.ranked(basis.found.measured)
    quantized = [name for name in basis.names if planner.quantizes(name)]
    points = []
    for keeping, selection in selections:
        kept = selection.kept(ranked)
        its = [name for name in quantized if name not in kept]
        inputs = {name: getattr(keeping, name) for name in way.inputs}
        points.append({"inputs": inputs, **_point(basis, its)})
    return points


def _point(basis: Basis, quantized: Sequence[str]) -> dict:
    return {
        "kept": len(basis.names) - len(quantized),
        "effect": basis.effect(quantized),
        **basis.ledger.outcome(quantized).to_json(),
    }
