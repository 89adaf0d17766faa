"""The outcome of quantizing a model, and its sentence, which nodes, panel and export share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Protocol

from comfy.model_patcher import ModelPatcher

from ...quant import Decider, KnownPlan, NumberFormat, Plan, bytes_of
from ..engine.network import own_layers, own_network
from ..files.model_file import ModelFile

_MIB, _GIB = 1 << 20, 1 << 30


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a diffusion model.

    Attributes:
        layers: shape of the weight of every Linear and Conv2d, by layer name.
        parameters: number of all its parameters.
    """

    layers: Mapping[str, tuple[int, ...]]
    parameters: int

    @classmethod
    def of(cls, file: ModelFile) -> Sizes:
        """Return the sizes of a file's diffusion model, without reading its weights."""
        own = {name: entry.shape for name, entry in file.own.items()}
        layers = {
            name.removesuffix(".weight"): shape
            for name, shape in own.items()
            if name.endswith(".weight") and len(shape) in (2, 4)
        }
        return cls(layers, sum(map(math.prod, own.values())))

    @classmethod
    def of_network(cls, patcher: ModelPatcher) -> Sizes:
        """Return the sizes of a model in memory."""
        layers = {name: tuple(layer.weight.shape) for name, layer in own_layers(patcher).items()}
        return cls(layers, sum(one.numel() for one in own_network(patcher).parameters()))


class Errors(Protocol):
    """What is known of a layer's error. A LayerPlan or a LayerFinding provides it."""

    relative_error: float | None
    output_error: float | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of quantizing a model.

    Attributes:
        before: bytes of the diffusion model in 16 bit; None if its sizes are not known.
        after: bytes of the quantized diffusion model.
        error: expected error of the layers' outputs (see quant.expected_error); None if that of
            a layer is not known.
        exact: False if some layers will be rounded with compensation but only their error without
            it is known, so that the actual error is smaller.
        samples: number of latent images that the statistics come from; 0 without statistics.
        title: of the number format.
    """

    before: int | None
    after: int | None
    error: float | None
    exact: bool
    samples: int
    title: str

    def sentence(self, seconds: float | None = None) -> str:
        """Return a sentence for users, such as "4.78 → 3.06 GiB, error 0.5%, 64 images, FP8".

        With the seconds that it took, they come last.
        """
        parts = [
            None if self.before is None else _sizes(self.before, self.after),
            None if self.error is None else _error_text(self.error, self.exact),
            f"{self.samples} image{'s' if self.samples > 1 else ''}" if self.samples else None,
            self.title,
            None if seconds is None else duration(seconds),
        ]
        return ", ".join(filter(None, parts))

    def to_json(self) -> dict:
        """Return the attributes by name."""
        return dict(vars(self))


def outcome_of(
    quantized: Collection[str],
    known: Mapping[str, Errors],
    sizes: Sizes,
    number_format: NumberFormat,
    samples: int,
    compensated: Collection[str] = (),
) -> Outcome:
    """Return the outcome of quantizing some layers of a model. For the others see Ledger.of."""
    return Ledger.of(known, sizes, number_format, samples, compensated).outcome(quantized)


def outcome_of_plan(plan: Plan, sizes: Sizes) -> Outcome:
    """Return the outcome of a Plan by which a model of these sizes was quantized."""
    compensated = {name for name, layer in plan.layers.items() if layer.output_error is not None}
    return outcome_of(
        plan.quantized, plan.layers, sizes, plan.number_format, plan.samples, compensated
    )


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What quantizing each layer of a model gives, from which any choice of layers is summed up.

    The panel asks for hundreds of sums at once, so each number has a mapping of its own.

    Attributes:
        saved: bytes by layer name.
        squares: by layer name, the square of its error times the number of its weights; None if
            the error is not known.
        exact: names of the layers whose errors are exact.
        weights: number of weights of all layers.
        before: bytes of the model in 16 bit; None if its sizes are not known.
        samples: number of latent images that the statistics come from.
        title: of the number format.
    """

    saved: Mapping[str, int]
    squares: Mapping[str, float | None]
    exact: frozenset[str]
    weights: int
    before: int | None
    samples: int
    title: str

    @classmethod
    def of(
        cls,
        known: Mapping[str, Errors],
        sizes: Sizes,
        number_format: NumberFormat,
        samples: int,
        compensated: Collection[str] = (),
    ) -> Ledger:
        """Make the ledger of a model.

        Args:
            known: what searching and rounding found about layers, by name.
            sizes: of the model.
            number_format: of the quantized layers.
            samples: number of latent images that the statistics come from.
            compensated: names of the layers whose rounding is compensated.
        """
        saved, squares, all_exact, weights = {}, {}, set(), 0
        for name, shape in sizes.layers.items():
            count = math.prod(shape)
            error, exact = error_of(known.get(name), name in compensated)
            saved[name] = 2 * count - bytes_of(number_format, shape)
            squares[name] = None if error is None else error * error * count
            weights += count
            if exact:
                all_exact.add(name)
        before = 2 * sizes.parameters if sizes.parameters else None
        told = before, samples, number_format.title
        return cls(saved, squares, frozenset(all_exact), weights, *told)

    def outcome(self, quantized: Collection[str]) -> Outcome:
        """Return the outcome of quantizing these layers."""
        try:
            saved = sum(map(self.saved.__getitem__, quantized))
        except KeyError:
            saved = None
        if self.before is None or saved is None:
            return Outcome(None, None, None, False, self.samples, self.title)
        squares, error = list(map(self.squares.__getitem__, quantized)), None
        if None not in squares:  # as quant.expected_error has it
            error = math.sqrt(math.fsum(squares) / self.weights) if self.weights else 0.0
        exact = all(map(self.exact.__contains__, quantized))
        return Outcome(self.before, self.before - saved, error, exact, self.samples, self.title)


def error_of(layer: Errors | None, compensated: bool) -> tuple[float | None, bool]:
    """Return a quantized layer's error (None if it is not known), and whether it is exact."""
    if layer is None or layer.relative_error is None:
        return None, False
    if compensated and layer.output_error is not None:
        return layer.output_error, True
    return layer.relative_error, not compensated


def known_of(decider: Decider) -> Mapping[str, Errors]:
    """Return what a Decider knows about layers before it is asked about the first one."""
    return decider.plan.layers if isinstance(decider, KnownPlan) else decider.known.layers


def _sizes(before: int, after: int) -> str:
    unit, name = (_GIB, "GiB") if before >= 1000 * _MIB else (_MIB, "MiB")
    return f"{before / unit:.2f} → {after / unit:.2f} {name}"


def duration(seconds: float) -> str:
    """Return a length of time for users; web/common/numbers.mjs writes the same."""
    units = (1, "sec"), (60, "min"), (3600, "hr")
    size, unit = units[(seconds >= 100) + (seconds >= 100 * 60)]
    return f"{max(1, math.floor(seconds / size + 0.5))} {unit}"


def _error_text(error: float, exact: bool) -> str:
    percent = 100 * error
    if 0 < percent < 0.1:
        return "error below 0.1%"
    return f"error {'' if exact else 'about '}{percent:.1f}%"
