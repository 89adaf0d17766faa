"""What a user wants in 16 bit, and the selection that follows from it for a model file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from ...quant import ByEffect, BySensitivity, NumberFormat, QuantizeSettings, bytes_of
from ..engine.model_structure import find_layers, needed_beside
from ..files.fingerprints import fingerprint, is_decided, looked_up
from ..files.model_file import ModelFile
from ..store.effects import find_effects
from .allowed import check_choice
from .also_keep import ENDS, also_kept
from .card import Card
from .choice import Choice, choose
from .search import search_once

BY_SENSITIVITY, BY_EFFECT, TO_FIT = "by sensitivity", "by effect", "by effect, to fit this card"
SELECTIONS = (BY_SENSITIVITY, BY_EFFECT, TO_FIT)
NOT_MEASURED = "no effects of this model's layers are measured in this format"
DEFAULT_MB = 80.0
"""3% of SDXL's bytes in FP8."""
MOST_MB, MOST_GB = 1e6, 1e4
"""Largest keep_mb and fit_gb."""


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What a user wants in 16 bit.

    Attributes:
        keep_ratio: share of the measured layers to keep by sensitivity.
        also_keep: names of further layers to keep (see also_keep.also_kept).
        selection: one of SELECTIONS.
        keep_mb: MiB that layers kept by effect may add.
        fit_gb: GiB that the whole diffusion model may have if layers are kept by effect; with 0,
            keep_mb decides. To fit this card, neither counts (see card.Card).
    """

    keep_ratio: float = 0.25
    also_keep: str = ENDS
    selection: str = BY_SENSITIVITY
    keep_mb: float = DEFAULT_MB
    fit_gb: float = 0.0

    def __post_init__(self) -> None:
        """Refuse other values, which a node's linked input may have."""
        check_choice("selection", self.selection, SELECTIONS)
        if not isinstance(self.also_keep, str):
            raise ValueError(f"also_keep must be a text, got {self.also_keep!r:.40}")
        for name, most in (("keep_mb", MOST_MB), ("fit_gb", MOST_GB)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ValueError(f"{name} must be a number from 0 to {most:.0f}, got {value!r:.40}")


def choose_keeping(
    statistics: str,
    file: ModelFile,
    settings: QuantizeSettings,
    keeping: Keeping,
    without: str,
    *,
    write: bool = True,
) -> Choice:
    """Decide how a model file is quantized, with the layers kept that a user wants in 16 bit.

    By effect, the measured effects decide. If none were measured, the output errors decide that the
    sketches give: for that, all layers are rounded once, and the errors are kept. Without
    statistics, only the layers of `also_keep` are kept.

    Args:
        statistics: see `choose`.
        file: 16-bit model file.
        settings: all but the selection.
        keeping: which layers stay 16 bit.
        without: see `choose`.
        write: False writes nothing and searches nothing, as the panel wants.

    Raises:
        ValueError: also_keep names no layer; or the model does not fit into `fit_gb`; or its
            effects would have to be estimated, which takes a search, but `write` is False.
        StatisticsError, FileNotFoundError: as for `choose`.
    """
    also = also_kept(keeping.also_keep, file)
    its_fingerprint = fingerprint(file) if write else looked_up(file.path)

    def chosen_by(selection: ByEffect | BySensitivity) -> Choice:
        wanted = dataclasses.replace(settings, selection=selection)
        its = its_fingerprint, file.name
        return choose(statistics, *its, wanted, without, keep=is_decided(file), write=write)

    if keeping.selection == BY_SENSITIVITY:
        return chosen_by(BySensitivity(keeping.keep_ratio, also))
    effects, how = measured_effects(its_fingerprint, settings.number_format), "by measured effect"
    if effects is None:
        if not write:
            raise ValueError(NOT_MEASURED)
        chosen = chosen_by(BySensitivity(0.0, also))
        if not chosen.by_statistics:
            return chosen
        effects, how = _estimated(file, chosen), "by estimated effect"
    costs = _costs(file, settings, effects)
    budget, about_card = _budget(file, keeping, costs, also)
    chosen = chosen_by(ByEffect(budget, effects, costs, also))
    return _told(chosen, how, about_card) if chosen.by_statistics else chosen


def _told(chosen: Choice, *first: str) -> Choice:
    """Return a Choice whose line for users begins with some texts, of which some may be empty."""
    return dataclasses.replace(chosen, about="; ".join(filter(None, (*first, chosen.about))))


def measured_effects(
    its_fingerprint: str, number_format: NumberFormat
) -> Mapping[str, float] | None:
    """Return a model's measured effects by layer name, above the noise; None if there are none."""
    found = find_effects(its_fingerprint, number_format.name)
    return None if found is None else above_noise(found.layers)


def above_noise(effects: Mapping[str, float]) -> dict[str, float]:
    """Return measured effects without the part that any change of a weight would have had.

    In 16 bit, even the smallest change leads to other roundings in all later layers. The layers
    with the smallest effects show how much that is, since they have no other effect. Their order is
    chance, so a hundredth of the effect is left, with which smaller layers come first.
    """
    if not effects:
        return {}
    noise = sorted(effects.values())[len(effects) // 4]
    return {name: max(effect - noise, noise / 100) for name, effect in effects.items()}


def _estimated(file: ModelFile, chosen: Choice) -> Mapping[str, float]:
    """Return each layer's squared relative output error, which estimates its effect."""
    plan, _ = search_once(file, chosen)
    return {name: error * error for name, error in _errors(plan.layers).items()}


def _errors(layers: Mapping) -> dict[str, float]:
    """Return the output errors; for a layer without a sketch, the error of its weights."""
    pairs = {name: (one.output_error, one.relative_error) for name, one in layers.items()}
    known = {name: pair[0] if pair[0] is not None else pair[1] for name, pair in pairs.items()}
    return {name: error for name, error in known.items() if error is not None}


def _costs(file: ModelFile, settings: QuantizeSettings, names: Iterable[str]) -> dict[str, int]:
    shapes = {
        name.removesuffix(".weight"): entry.shape
        for name, entry in file.own.items()
        if name.endswith(".weight")
    }
    if not shapes.keys() >= set(names):  # the file is in a layout that ComfyUI converts
        shapes = {name: tuple(weight.shape) for name, weight in find_layers(file).items()}
    return costs_of(shapes, settings.number_format, names)


def costs_of(
    shapes: Mapping[str, Sequence[int]], number_format: NumberFormat, names: Iterable[str]
) -> dict[str, int]:
    """Return the bytes that each of some layers adds to a quantized model when it is kept.

    Args:
        shapes: of the weights by layer name; layers without a shape are left out.
        number_format: of the quantized layers.
        names: of layers.
    """
    return {
        name: 2 * math.prod(shapes[name]) - bytes_of(number_format, shapes[name])
        for name in names
        if name in shapes
    }


def _budget(
    file: ModelFile, keeping: Keeping, costs: Mapping[str, int], also: frozenset[str]
) -> tuple[int, str]:
    """Return the bytes that layers kept by effect may add, and what to tell of them.

    Raises:
        ValueError: the model does not fit into `fit_gb`, however many layers are quantized.
    """
    if keeping.selection == BY_EFFECT and not keeping.fit_gb:
        return int(keeping.keep_mb * (1 << 20)), ""
    whole = 2 * sum(math.prod(entry.shape) for entry in file.own.values())
    least = whole - sum(cost for name, cost in costs.items() if name not in also)
    if keeping.selection == TO_FIT:
        card = Card.of(needed_beside(file))
        return max(0, card.weights - least), card.sentence(least)
    budget = int(keeping.fit_gb * (1 << 30)) - least
    if budget < 0:
        raise ValueError(
            f"{file.name} does not fit into {keeping.fit_gb:g} GiB: with every layer quantized it "
            f"has {least / (1 << 30):.2f} GiB"
        )
    return budget, ""
