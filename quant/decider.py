"""Deciding how each layer is stored, and storing it so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, Protocol

import torch

from .compensate import output_error
from .formats import Clipping, NumberFormat
from .plan import Plan, known_errors
from .search import SearchSettings


class Refined(Protocol):
    """Layers that were rounded before, in a file."""

    def read(
        self, name: str, up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return a layer's quantized weight and weight_scale as `up` copies them, if it has any."""

    def read_unchecked(
        self, name: str, up: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return them and whether they are right, a bool scalar tensor; who asks must look."""

    def reject(self, name: str) -> None:
        """Note that a layer was not right."""


class Decider(Protocol):
    """Decides how each layer is stored, when its weight is loaded.

    A Planner searches; a KnownPlan repeats a finished Plan.

    Attributes:
        number_format: of the layers that are quantized.
        settings: of the search; None if it searches nothing.
        sketches: (K, in channels) of layers' inputs by name, by which rounding is compensated;
            None rounds to the nearest.
        refined: has the layers that were rounded before; None if there are none.
        output_errors: what compensated rounding adds to layers' outputs, by name: what is known
            already, and what `stored` measures.
    """

    number_format: NumberFormat
    settings: SearchSettings | None
    sketches: Mapping[str, torch.Tensor] | None
    refined: Refined | None
    output_errors: dict[str, float | torch.Tensor]

    def quantizes(self, name: str) -> bool:
        """Whether a layer is quantized."""

    def searches(self, name: str) -> bool:
        """Whether `clipping_of` needs a layer's weight."""

    def clipping_of(self, name: str, weight: torch.Tensor | None) -> Clipping | None:
        """Return where a layer is clipped, None where it keeps its 16-bit weight.

        Every layer of the model is asked about in the model's order, and may be asked about again.
        """

    def input_amax(self, name: str) -> float | None:
        """Return the largest |x| of a layer's input, None where it is not known."""

    def unknown(self, layers: Collection[str]) -> list[str]:
        """Return the measured layers that are not among a model's."""

    def restrict(self, layers: Collection[str]) -> list[str]:
        """Leave out measured layers that the model does not have; return their names."""

    def finish(self) -> Plan:
        """Return the Plan of all layers that were asked about, with their output errors."""


@dataclasses.dataclass
class KnownPlan:
    """A Decider that repeats a finished Plan; nothing is searched.

    Attributes:
        plan: what it repeats.
        sketches: as Decider's.
        refined: as Decider's.
        output_errors: as Decider's.
    """

    plan: Plan
    settings: ClassVar[None] = None
    sketches: Mapping[str, torch.Tensor] | None = dataclasses.field(default=None, compare=False)
    refined: Refined | None = dataclasses.field(default=None, compare=False)
    output_errors: dict[str, float | torch.Tensor] = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.output_errors = known_errors(self.plan.layers)

    @property
    def number_format(self) -> NumberFormat:
        """Of the layers that are quantized."""
        return self.plan.number_format

    def quantizes(self, name: str) -> bool:
        """Whether a layer is quantized."""
        return name in self.plan.layers and self.plan.layers[name].quantized

    def searches(self, _: str) -> bool:
        """Whether `clipping_of` needs a layer's weight: never."""
        return False

    def clipping_of(self, name: str, _: torch.Tensor | None = None) -> Clipping | None:
        """Return where a layer is clipped, None where it keeps its 16-bit weight.

        Raises:
            ValueError: the Plan is of another model, which has no such layer.
        """
        if name not in self.plan.layers:
            raise ValueError(f"the plan belongs to another model: it has no layer {name!r}")
        return self.plan.layers[name].clipping

    def input_amax(self, name: str) -> float | None:
        """Return the largest |x| of a layer's input, None where it is not known."""
        return self.plan.input_amax(name)

    def unknown(self, _: Collection[str]) -> list[str]:
        """Return no layers: a Plan needs no statistics any more."""
        return []

    restrict = unknown

    def finish(self) -> Plan:
        """Return the Plan, with the output errors that were measured."""
        return self.plan.with_output_errors(self.output_errors)


def decider_of(how: Decider | Plan) -> Decider:
    """Return a Decider unchanged; for a Plan, a Decider that repeats it."""
    return KnownPlan(how) if isinstance(how, Plan) else how


def stored(
    decider: Decider, name: str, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Decide about a layer and quantize it; return its stored weight and FP32 weight_scale.

    None where the layer keeps its weight.

    Args:
        decider: is asked about the layer. Its output error is added, if it is not known yet.
        name: of the layer.
        weight: (out, in, ...), on the device that searches and rounds.
    """
    clipping = decider.clipping_of(name, weight)
    if clipping is None:
        return None
    sketch = None if decider.sketches is None else decider.sketches.get(name)
    data, scale = decider.number_format.quantize(weight, clipping, sketch)
    if sketch is not None and name not in decider.output_errors:
        decider.output_errors[name] = output_error(weight, data, scale, sketch)
    return data, scale
