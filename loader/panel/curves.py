"""Curves for the panel: size against expected error, for every number format and selection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ...quant import NUMBER_FORMATS, BySensitivity, NumberFormat, QuantizeSettings, Selection
from ..files.layer_formats import FILE_FORMATS
from .catalogue import Model
from .preview import Basis

_STEPS = 100
_NOT_OFFERED = ("original V2",)
"""On today's ComfyUI only our loaders read this format. The export node still writes it."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A kind of selection with one number, from 0 (nothing kept) to 1 (everything kept).

    Attributes:
        name: of the selection, for users.
        inputs: takes the number, returns the values for the inputs of loader and export.
        selection: takes the number, returns the Selection.
    """

    name: str
    inputs: Callable[[float], dict]
    selection: Callable[[float, Basis], Selection]


WAYS = (
    Way(
        "sensitivity",
        lambda share: {"keep_ratio": share},
        lambda share, basis: BySensitivity(share, basis.shapes.ends),
    ),
)
"""All of them. The panel draws a line for each, in each number format."""


def curves(model: Model) -> dict:
    """Return the lines of a model that has statistics.

    Every point has the inputs that lead to it, so that the panel can set a node or an export.
    """
    lines = [
        _line(model, number_format, way)
        for number_format in NUMBER_FORMATS.values()
        for way in WAYS
    ]
    first = lines[0]["points"][0]
    return {"before": first["before"], "samples": first["samples"], "lines": lines}


def _line(model: Model, number_format: NumberFormat, way: Way) -> dict:
    basis = Basis.of(model, QuantizeSettings(number_format, compensated=True))
    shares = [step / _STEPS for step in range(_STEPS + 1)]
    return {
        "mode": number_format.name,
        "selection": way.name,
        "inputs": {"mode": number_format.name},
        "formats": _formats(number_format),
        "points": [_point(basis, way, share) for share in shares],
    }


def _formats(number_format: NumberFormat) -> list[str]:
    """Return the file formats of a line."""
    return [
        name
        for name, one in FILE_FORMATS.items()
        if one.number_format == number_format and name not in _NOT_OFFERED
    ]


def _point(basis: Basis, way: Way, share: float) -> dict:
    planner = basis.planner(way.selection(share, basis))
    quantized = [name for name in basis.names if planner.quantizes(name)]
    kept = len(basis.names) - len(quantized)
    return {"inputs": way.inputs(share), "kept": kept, **basis.ledger.outcome(quantized).to_json()}
