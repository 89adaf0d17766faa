"""The Plan: which layers are kept, how the others are clipped, and why. Nothing else decides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from .formats import Clipping, NumberFormat
from .reasons import Reason
from .search import DEFAULT_SETTINGS, SearchSettings
from .selection import Selection


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    Attributes:
        name: relative to the diffusion model.
        amax: clipping magnitude in the weight's units, of formats with a scale for each row that
            of the row which is clipped highest; None for a layer that keeps its weights.
        reason: why it is kept or quantized.
        sensitivity: output variance, None where not measured.
        relative_error: the quantized layer's weighted root mean square error, divided by the
            weighted root mean square of its weights; None for a kept layer.
        warnings: sentences about statistics that do not fit the weights.
        input_amax: largest |x| of the layer's input, None where not measured.
        output_error: what compensated rounding adds to the layer's output, as a share of it; None
            where rounding was to the nearest, or is not known.
        row_shares: as Clipping's, in bytes.
    """

    name: str
    amax: float | None
    reason: Reason
    sensitivity: float | None = None
    relative_error: float | None = None
    warnings: tuple[str, ...] = ()
    input_amax: float | None = None
    output_error: float | None = None
    row_shares: bytes | None = None

    @property
    def quantized(self) -> bool:
        """Whether the layer is quantized."""
        return self.amax is not None

    @property
    def clipping(self) -> Clipping | None:
        """Where its weights are clipped, None for a layer that keeps them."""
        return None if self.amax is None else Clipping(self.amax, self.row_shares)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens to every layer of one diffusion model, by one set of statistics and settings.

    Attributes:
        number_format: of the quantized layers.
        selection: that chose the layers; None where the file was quantized already.
        layers: every Linear and Conv2d of the model by name, in the model's order.
        settings: of the search.
        samples: number of latent images that the statistics come from; 0 where unknown.
    """

    number_format: NumberFormat
    selection: Selection | None
    layers: Mapping[str, LayerPlan]
    settings: SearchSettings = DEFAULT_SETTINGS
    samples: int = dataclasses.field(default=0, compare=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about statistics that do not fit the weights."""
        return tuple(warning for layer in self.layers.values() for warning in layer.warnings)

    @property
    def quantized(self) -> list[str]:
        """Names of the quantized layers."""
        return [name for name, layer in self.layers.items() if layer.quantized]

    @property
    def kept(self) -> list[str]:
        """Names of the layers that keep their 16-bit weights."""
        return [name for name, layer in self.layers.items() if not layer.quantized]

    @property
    def output_error(self) -> float | None:
        """Mean of the quantized layers' output errors, None where none is known.

        It is an estimate, from rows of the sketches that had no part in rounding.
        """
        errors = [layer.output_error for layer in self.layers.values() if layer.quantized]
        known = [error for error in errors if error is not None]
        return sum(known) / len(known) if known else None

    def input_amax(self, name: str) -> float | None:
        """Return the largest |x| of a layer's input; None if it is not known."""
        return self.layers[name].input_amax if name in self.layers else None

    def with_output_errors(self, errors: Mapping[str, float | torch.Tensor]) -> Plan:
        """Return this Plan with output errors of its quantized layers; nan counts as unknown."""
        known = {name: float(error) for name, error in errors.items()}
        known = {name: error for name, error in known.items() if not math.isnan(error)}
        changed = {
            name: dataclasses.replace(layer, output_error=known[name])
            for name, layer in self.layers.items()
            if layer.quantized and known.get(name, layer.output_error) != layer.output_error
        }
        layers = MappingProxyType({**self.layers, **changed})
        return dataclasses.replace(self, layers=layers) if changed else self


def known_errors(layers: Mapping[str, LayerPlan]) -> dict[str, float | torch.Tensor]:
    """Return the output errors of the layers that have one, by name."""
    return {k: one.output_error for k, one in layers.items() if one.output_error is not None}


def expected_error(layers: Iterable[tuple[float, int]]) -> float:
    """Return the expected relative error of a whole model's weights.

    It is the root mean square of the layers' relative errors, in which every parameter counts
    alike.

    Args:
        layers: relative error (see LayerPlan) and number of weights of every measured layer. The
            error of a kept layer is 0.
    """
    squares = weights = 0.0
    for error, count in layers:
        squares += error * error * count
        weights += count
    return math.sqrt(squares / weights) if weights else 0.0
