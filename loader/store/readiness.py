"""Whether enough was recorded of a model to quantize it, and to stop recording it."""

from __future__ import annotations

from ...calibration import Statistics, seen_levels
from ..host import settings

USABLE_SAMPLES, USABLE_CALLS, USABLE_LEVELS = 32, 8, 4
"""Latent images, measured forwards of each layer, and noise levels (of 8) that are enough.

docs/recording.md has the experiment by which they were chosen.
"""

IMAGES, LAYERS, CALLS, NOISE = "images", "layers", "calls", "noise"
"""Values of `missing`: what is still missing."""


def target() -> int:
    """Return the number of latent images at which background recording ends."""
    return settings.current().target


def missing_layers(statistics: Statistics) -> int:
    """Return how many of the model's layers were never measured; 0 if the file does not say."""
    layers = statistics.meta.get("layers")
    return max(0, layers - len(statistics)) if type(layers) is int else 0


def missing(statistics: Statistics) -> str | None:
    """Return what is missing before the model can be quantized: IMAGES, LAYERS, CALLS or NOISE.

    None if nothing is. Recording does not wait for ever: from the target on, noise levels that
    were not seen are taken as levels at which this user does not sample. From twice the target on,
    layers that were not measured, or hardly, are taken as layers that the model hardly calls.
    """
    samples = statistics.samples
    if samples < USABLE_SAMPLES:
        return IMAGES
    if samples < 2 * target() and missing_layers(statistics):
        return LAYERS
    if samples < 2 * target() and statistics.fewest_calls < USABLE_CALLS:
        return CALLS
    if samples < target() and seen_levels(statistics.meta) < USABLE_LEVELS:
        return NOISE
    return None


def is_complete(statistics: Statistics) -> bool:
    """Whether background recording is over: the target is reached and nothing is missing."""
    return statistics.samples >= target() and is_usable(statistics)


def is_usable(statistics: Statistics) -> bool:
    """Whether enough was recorded of a model to quantize it."""
    return missing(statistics) is None


def milestone(statistics: Statistics) -> int:
    """Return the last milestone that was passed: a number of latent images; 0 while not usable.

    Milestones are 32, 64, 128 and the target. A model gets a new Plan only at a milestone, so that
    between two of them the same workflow gives the same picture.
    """
    if not is_usable(statistics):
        return 0
    if statistics.samples >= target():
        return target()
    step = USABLE_SAMPLES
    while 2 * step <= statistics.samples:
        step *= 2
    return step
