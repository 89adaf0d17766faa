"""Whether enough was recorded of a model to quantize it, and to end its recording."""

from __future__ import annotations

from ...calibration import Statistics, seen_levels
from ..host import settings

USABLE_SAMPLES, USABLE_CALLS, USABLE_LEVELS = 32, 8, 4
"""Images, measured forwards of each layer, and levels of noise (of 8) that are enough.

docs/recording.md has the experiment by which they were chosen.
"""

IMAGES, LAYERS, CALLS, NOISE = "images", "layers", "calls", "noise"
"""What may be missing."""


def target() -> int:
    """Return the samples at which passive recording ends."""
    return settings.current().target


def missing_layers(statistics: Statistics) -> int:
    """Return how many of the model's layers were never measured, as far as the file says."""
    layers = statistics.meta.get("layers")
    return max(0, layers - len(statistics)) if type(layers) is int else 0


def fewest_calls(statistics: Statistics) -> int:
    """Return how often the layer was measured that was so least often; 0 without layers."""
    return min((layer.calls for layer in statistics.values()), default=0)


def missing(statistics: Statistics) -> str | None:
    """Return which of IMAGES, LAYERS, CALLS and NOISE it still takes to quantize; None of none.

    Levels of noise that were not seen by the target are those that its user does not sample at. A
    layer that was not measured, or hardly, by twice the target is one that the model hardly calls.
    """
    samples = statistics.samples
    if samples < USABLE_SAMPLES:
        return IMAGES
    if samples < 2 * target() and missing_layers(statistics):
        return LAYERS
    if samples < 2 * target() and fewest_calls(statistics) < USABLE_CALLS:
        return CALLS
    if samples < target() and seen_levels(statistics.meta) < USABLE_LEVELS:
        return NOISE
    return None


def is_complete(statistics: Statistics) -> bool:
    """Whether passive recording is over: at the target, once nothing is missing."""
    return statistics.samples >= target() and is_usable(statistics)


def is_usable(statistics: Statistics) -> bool:
    """Whether a model can be quantized by what was recorded of it."""
    return missing(statistics) is None


def milestone(statistics: Statistics) -> int:
    """Return the last number of samples at which a model gets a new Plan, 0 while not usable.

    They are 32, 64, 128 and the target: in between, the same workflow gives the same picture.
    """
    if not is_usable(statistics):
        return 0
    if statistics.samples >= target():
        return target()
    step = USABLE_SAMPLES
    while 2 * step <= statistics.samples:
        step *= 2
    return step
