"""Findings: what searches found about a model's layers. They do not depend on keep_ratio."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from .plan import LayerPlan, Plan
from .reasons import Reason


@dataclasses.dataclass(frozen=True)
class LayerFinding:
    """What is known about one layer.

    Attributes:
        sensitivity: output variance; None where not measured, nan where not finite.
        amax: what the search found; None where the layer was not searched.
        relative_error: as in LayerPlan; None where the layer was not searched.
        warnings: as in LayerPlan.
        input_amax: as in LayerPlan.
        output_error: as in LayerPlan.
        row_shares: as in LayerPlan.
    """

    sensitivity: float | None
    amax: float | None = None
    relative_error: float | None = None
    warnings: tuple[str, ...] = ()
    input_amax: float | None = None
    output_error: float | None = None
    row_shares: bytes | None = None

    # This makes it a MeasuredLayer, so that layers can be selected by findings alone.
    importance: ClassVar[None] = None

    @classmethod
    def of(cls, layer: LayerPlan) -> LayerFinding:
        """Return what a Plan knows about a layer, but not whether it is kept."""
        sensitivity = math.nan if layer.reason is Reason.KEPT_NOT_FINITE else layer.sensitivity
        found = (
            layer.amax,
            layer.relative_error,
            layer.warnings,
            layer.input_amax,
            layer.output_error,
            layer.row_shares,
        )
        return cls(sensitivity, *found)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found for one model, number format, statistics and search settings.

    A Planner that is given findings selects layers by their sensitivities. It searches only the
    layers whose amax they lack.

    Attributes:
        layers: every Linear and Conv2d by name, in the model's order.
        samples: number of latent images that the sensitivities come from.
    """

    layers: Mapping[str, LayerFinding]
    samples: int = 0

    @classmethod
    def of(cls, plan: Plan, samples: int) -> Findings:
        """Return what one Plan found."""
        layers = {name: LayerFinding.of(layer) for name, layer in plan.layers.items()}
        return cls(MappingProxyType(layers), samples)

    @property
    def measured(self) -> dict[str, LayerFinding]:
        """The layers that have statistics."""
        return {k: layer for k, layer in self.layers.items() if layer.sensitivity is not None}

    def amax(self, name: str) -> float | None:
        """Return a layer's amax; None where it was not searched."""
        return self.layers[name].amax if name in self.layers else None

    def including(self, plan: Plan) -> Findings:
        """Return these findings with those of a Plan that was made from them."""
        layers = dict(self.layers)
        for name in plan.quantized:
            if name in layers:
                found, before = LayerFinding.of(plan.layers[name]), layers[name].output_error
                if found.output_error is None:  # rounded to the nearest this time
                    found = dataclasses.replace(found, output_error=before)
                layers[name] = found
        return Findings(MappingProxyType(layers), self.samples)

    def to_json(self) -> dict:
        """Return a JSON-ready dict that from_json turns back into equal findings."""
        layers = {}
        for name, layer in self.layers.items():
            layers[name] = dataclasses.asdict(layer)
            if layer.sensitivity is not None and math.isnan(layer.sensitivity):
                layers[name]["sensitivity"] = "nan"  # JSON has no nan, and no bytes
            if layer.row_shares is not None:
                layers[name]["row_shares"] = base64.b64encode(layer.row_shares).decode()
        return {"samples": self.samples, "layers": layers}

    @classmethod
    def from_json(cls, data: dict) -> Findings:
        """Rebuild findings.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: `data` is not what to_json returned.
        """
        layers = {}
        for name, layer in data["layers"].items():
            numbers = {
                key: None if layer[key] is None else float(layer[key])
                for key in ("sensitivity", "amax", "relative_error", "input_amax", "output_error")
            }
            shares = layer["row_shares"]
            layers[name] = LayerFinding(
                **numbers,
                warnings=tuple(map(str, layer["warnings"])),
                row_shares=None if shares is None else base64.b64decode(shares, validate=True),
            )
        return cls(MappingProxyType(layers), int(data["samples"]))
