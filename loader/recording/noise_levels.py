"""The noise levels of a sampling, taken from the sigmas that its sampler is given."""

from __future__ import annotations

import logging

from comfy.model_patcher import ModelPatcher

from ...calibration import NOISE_LEVELS, noise_levels


def levels_of(patcher: ModelPatcher, arguments: tuple, named: dict) -> dict[str, str]:
    """Return an entry for the statistics' meta with a sampling's noise levels; {} if unknown.

    Forwards that a sampler makes between two sigmas are not counted.

    Args:
        patcher: MODEL that samples.
        arguments, named: arguments of CFGGuider.outer_sample after the noise.
    """
    try:
        sigmas = named["sigmas"] if "sigmas" in named else arguments[2]
        schedule = patcher.get_model_object("model_sampling")
        return {NOISE_LEVELS: noise_levels(sigmas[:-1].tolist(), schedule.percent_to_sigma)}
    except Exception as error:  # other nodes have schedules of their own; the picture must be made
        logging.info("HSWQ: the noise levels of this sampling are not known: %s", error)
        return {}
