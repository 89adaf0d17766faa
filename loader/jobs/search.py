"""Searching all layers of a model at once, so that the Plan for any keep_ratio is known."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ...quant import BySensitivity, Decider, KnownPlan, NumberFormat, Plan, QuantizeSettings
from ..engine.model_structure import find_layers
from ..engine.quantizer import Quantizer, restrict
from ..files.fingerprints import fingerprint, is_decided
from ..files.model_file import ModelFile
from .choice import FAIL, Choice, choose
from .outcome import known_of


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
    everything = BySensitivity(0.0)  # nothing is kept for its sensitivity
    settings = QuantizeSettings(number_format, everything, compensated=True)
    its = fingerprint(file)
    chosen = choose(statistics, its, file.name, settings, FAIL, keep=is_decided(file))
    plan, searched = search_once(file, chosen)
    if searched is None:
        return f"all layers of {file.name} were searched before; {chosen.samples} images"
    can = f"{len(plan.quantized)} that can be {number_format.title}"
    text = f"{searched} layers searched of {can}; {chosen.samples} images"
    logging.info("HSWQ: %s: %s", file.name, text)
    return text


def search_once(file: ModelFile, chosen: Choice) -> tuple[Plan, int | None]:
    """Return the Plan with all layers' errors, and how many were searched; None if all was known.

    What is found is kept.
    """
    decider = chosen.decider
    if decider.refined is not None:
        decider.refined.close()
        decider.refined = None
    unknown = lacks_error(decider)
    if isinstance(decider, KnownPlan) and not any(map(unknown, decider.plan.quantized)):
        return decider.plan, None
    plan, searched = search(file, decider)
    chosen.keep(plan)
    return plan, searched


def lacks_error(decider: Decider) -> Callable[[str], bool]:
    """Return what says of a layer whether it must be rounded to know its error.

    That is so where rounding is compensated. The rounded weight itself is not kept: nobody may ever
    load the model so.
    """
    known, sketches = known_of(decider), decider.sketches or ()
    return lambda name: name in sketches and (name not in known or known[name].output_error is None)


def search(file: ModelFile, decider: Decider) -> tuple[Plan, int]:
    """Return the Plan, and how many layers were searched for it."""
    layers = find_layers(file)
    restrict(decider, layers, file.name)
    searched, unknown = sum(map(decider.searches, layers)), lacks_error(decider)
    quantizer = Quantizer(decider, len(layers))
    for name, weight in layers.items():
        rounded = decider.quantizes(name) and unknown(name)
        (quantizer.quantize if rounded else quantizer.search)(name, weight)
    return quantizer.finish(), searched
