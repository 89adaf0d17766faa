"""Searching all layers of a model at once, so that the Plan for any keep_ratio is known."""

from __future__ import annotations

import logging

from ...quant import BySensitivity, Decider, KnownPlan, NumberFormat, Plan, QuantizeSettings
from ..engine.model_structure import find_layers
from ..engine.quantizer import Quantizer, restrict
from ..files.fingerprints import fingerprint, is_decided
from ..files.model_file import ModelFile
from .choice import FAIL, choose


def search_all(path: str, statistics: str, number_format: NumberFormat) -> str:
    """Search every measured layer of a model file that was not searched yet; cache the result.

    Memory for one layer is enough. After an error or an interrupt, the cache is unchanged.

    Args:
        path: of a checkpoint or a diffusion model, in 16 bit.
        statistics: "auto" or a file of the statistics folder.
        number_format: for which to search.

    Returns:
        A line about it, for users.

    Raises:
        ModelFileError: the file is damaged, unknown, or quantized already.
        StatisticsError, ValueError: as for choice.choose; the statistics are another model's.
    """
    file = ModelFile(path)
    file.check_16_bit()
    settings = QuantizeSettings(
        number_format, BySensitivity(0.0)
    )  # nothing is kept for its sensitivity
    its = fingerprint(file)
    chosen = choose(statistics, its, file.name, settings, FAIL, keep=is_decided(file))
    if isinstance(chosen.decider, KnownPlan):
        return f"all layers of {file.name} were searched before; {chosen.about}"
    plan, searched = search(file, chosen.decider)
    chosen.keep(plan)
    text = f"{searched} layers searched of {len(plan.quantized)} that can be FP8; {chosen.about}"
    logging.info("HSWQ: %s: %s", file.name, text)
    return text


def search(file: ModelFile, decider: Decider) -> tuple[Plan, int]:
    """Return the Plan, and how many layers were searched for it."""
    layers = find_layers(file)
    restrict(decider, layers, file.name)
    searched = sum(map(decider.searches, layers))
    quantizer = Quantizer(decider, len(layers))
    for name, weight in layers.items():
        quantizer.search(name, weight)
    return quantizer.finish(), searched
